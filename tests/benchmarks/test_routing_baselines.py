import torch
from routing import baselines


def test_simpler_choosers_are_right_as_often_as_counted_by_hand() -> None:
    train = {"base": torch.zeros(3, 2), "near": torch.ones(5, 2), "far": torch.full((5, 2), 9.0)}
    test = {
        "base": torch.tensor([[0.1, 0.0], [0.9, 1.0]]),  # the second looks like `near`
        "near": torch.ones(1, 2),
        "far": torch.full((1, 2), 8.0),
        "another": torch.zeros(7, 2),  # no router of these packs is asked
    }
    assert baselines(train, test) == {"nearest mean": 0.75, "majority": 0.25, "random": 1 / 3}
