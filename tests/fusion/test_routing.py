from pathlib import Path

import pytest
import torch

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion.routing import Router, fit_router, prompt_features, train_router
from graftllm.generation import load_model, load_tokenizer
from graftllm.recipe import RouterOptions
from graftllm.records import Message, Prompt


def _clusters(count: int = 100, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, 16, generator=torch.Generator().manual_seed(42))
    return {
        name: center * 2 + torch.randn(count, 16, generator=draw)
        for name, center in zip(("base", "math", "code"), centers, strict=True)
    }


def _accuracy(router: Router, features: dict[str, torch.Tensor]) -> float:
    right = [route.name == name for name, rows in features.items() for route in router.route(rows)]
    return sum(right) / len(right)


def test_separable_prompts_are_told_apart() -> None:
    router = train_router(_clusters(), RouterOptions(), seed=0)
    assert _accuracy(router, _clusters(seed=1)) > 0.95
    assert router.classes == ("base", "math", "code")


def test_probabilities_sum_to_one_and_name_every_class() -> None:
    route = train_router(_clusters(), RouterOptions(), seed=0).route(_clusters(3)["math"])[0]
    assert sum(route.probabilities.values()) == pytest.approx(1)
    assert list(route.probabilities) == ["base", "math", "code"]


def test_unsure_prompts_go_to_the_base() -> None:
    certain = train_router(_clusters(), RouterOptions(threshold=0.999999), seed=0)
    features = _clusters(seed=1)
    between = (features["math"] + features["code"]) / 2
    assert all(route.name == "base" for route in certain.route(between))


def test_rare_classes_are_learnt_beside_frequent_ones() -> None:
    features = _clusters(400)
    features["code"] = features["code"][:12]
    router = train_router(features, RouterOptions(), seed=0)
    assert sum(route.name == "code" for route in router.route(_clusters(seed=1)["code"])) > 80


def test_the_same_seed_trains_the_same_router() -> None:
    first, second = (train_router(_clusters(), RouterOptions(), seed=3) for _ in range(2))
    assert first.route(_clusters(5)["math"]) == second.route(_clusters(5)["math"])


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_router(_clusters(20), RouterOptions(steps=2), seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_a_saved_router_routes_the_same(tmp_path: Path) -> None:
    router = train_router(_clusters(), RouterOptions(threshold=0.7), seed=0)
    router.save(tmp_path / "router.safetensors")
    loaded = Router.load(tmp_path / "router.safetensors")
    assert loaded.route(_clusters(9)["code"]) == router.route(_clusters(9)["code"])
    assert (loaded.threshold, loaded.temperature) == (router.threshold, router.temperature)


@pytest.mark.parametrize("content", [b"", b"text", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_no_router(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FusionError, match="x: not a router"):
        Router.load(tmp_path / "x")


def test_features_do_not_depend_on_the_rest_of_the_batch(base: Checkpoint, prompts: list[Prompt]) -> None:
    model, words = load_model(base.path), load_tokenizer(base.path)
    questions = [prompt.question for prompt in prompts[:3]]
    questions.append((Message(role="user", content="a much longer question than the others are"),))
    together = prompt_features(model, words, questions)
    assert together.shape == (4, 64)
    alone = torch.cat([prompt_features(model, words, [question]) for question in questions])
    assert torch.allclose(together, alone, atol=1e-4)


def test_prompts_of_one_kind_only_are_refused(base: Checkpoint, prompts: list[Prompt]) -> None:
    with pytest.raises(FusionError, match="expected prompts of 'base' and of at least one pack, found math"):
        fit_router(base.path, {"math": prompts})
    with pytest.raises(FusionError, match="found none"):
        fit_router(base.path, {})
