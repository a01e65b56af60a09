import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graftllm.compression.prices import Calibration
from graftllm.errors import FusionError
from graftllm.fusion.methods.quantiles import order_statistics
from graftllm.fusion.methods.table import METHODS, method
from graftllm.fusion.methods.tasks import Knobs, Tasks
from graftllm.fusion.search import search_weights
from graftllm.tensors import TensorSpec

NAMES = ("code", "math", "prose")


def tasks(*deltas: list[float], weights: list[float] | None = None) -> Tasks:
    """Tasks of one vector each."""
    stack = torch.tensor(deltas)
    return Tasks(NAMES[: len(stack)], torch.tensor(weights or [1.0] * len(stack)), {"v": stack})


def merged(name: str, found: Tasks, task: int = 0, **knobs: float) -> dict[str, Tensor]:
    row = METHODS[name]
    chosen = row.knobs({key: value for key, value in knobs.items() if key in row.defaults})
    merge = row.prepare(found, chosen)
    return {key: merge(key, stack, task) for key, stack in found.deltas.items()}


def vector(name: str, found: Tasks, task: int = 0, **knobs: float) -> list[float]:
    return [round(value, 5) for value in merged(name, found, task, **knobs)["v"].tolist()]


def random_model(count: int, *, seed: int = 0) -> Tasks:
    """Tasks of a matrix, a vector and a stack of experts each, with moments of the matrix's input."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (6, 5), "norm": (7,), "experts": (2, 3, 4)}
    deltas = {name: torch.randn(count, *shape, generator=draw) for name, shape in shapes.items()}
    inputs = [torch.randn(9, 5, generator=draw) for _ in range(count)]
    seen = tuple(Calibration({"matrix": x.T @ x / 9}, 9) for x in inputs)
    return Tasks(NAMES[:count], torch.ones(count), deltas, seen)


def reordered(found: Tasks, order: list[int]) -> Tasks:
    return Tasks(
        tuple(found.names[i] for i in order),
        found.weights[order],
        {name: stack[order] for name, stack in found.deltas.items()},
        tuple(found.calibrations[i] for i in order),
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_tasks_does_not_matter(name: str) -> None:
    found, order = random_model(3), [2, 0, 1]
    one = merged(name, found, order[0], density=0.4, rank=2)
    other = merged(name, reordered(found, order), 0, density=0.4, rank=2)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pcb", "regmean")])
def test_one_task_with_everything_kept_is_that_task(name: str) -> None:
    found = random_model(1)
    out = merged(name, found, density=1.0, scale=1.0, rank=5)
    assert all(torch.equal(out[key], found.deltas[key][0]) for key in out)


def test_one_task_is_that_task_for_regmean_up_to_rounding_and_for_pcb_where_it_wins() -> None:
    found = random_model(1)
    regmean = merged("regmean", found)
    assert all(torch.allclose(regmean[key], found.deltas[key][0], atol=1e-5) for key in regmean)
    pcb = merged("pcb", tasks([4.0, -3.0, 2.0, 1.0, 0.0]), density=0.5)["v"]
    assert pcb.tolist() == pytest.approx([3.0, -3.0, 0.0, 0.0, 0.0])  # the largest magnitude is clipped to the next


@pytest.mark.parametrize(
    "name", ["linear", "ties", "ties-tensor", "sce", "sce-fuseai", "emr", "regmean", "dare-ties", "della"]
)
def test_identical_tasks_are_that_task(name: str) -> None:
    one = random_model(1)
    three = reordered(one, [0, 0, 0])
    found = Tasks(NAMES, three.weights, three.deltas, three.calibrations)
    out = merged(name, found, density=1.0, scale=1.0)
    assert all(torch.allclose(out[key], one.deltas[key][0], atol=1e-5) for key in out)


@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_that_is_a_single_number_merges_as_a_vector_of_one(name: str) -> None:
    vectors = {"v": torch.tensor([[3.0], [1.0], [-1.0]]), "w": torch.tensor([[0.5], [2.0], [4.0]])}
    numbers = {key: stack[:, 0] for key, stack in vectors.items()}
    both = [merged(name, Tasks(NAMES, torch.ones(3), deltas), 1) for deltas in (vectors, numbers)]
    for key in vectors:
        assert both[1][key].shape == () and both[1][key] == both[0][key][0]


@pytest.mark.parametrize("name", ["ties", "ties-tensor", "dare-ties", "della", "task-arithmetic"])
def test_a_negative_weight_turns_a_task_around(name: str) -> None:
    found = tasks([4.0, -3.0, 1.0], weights=[-2.0])
    share = 2.0 if name == "task-arithmetic" else 1.0  # a mean of one, whatever its weight
    assert vector(name, found, density=1.0, scale=1.0) == [-4.0 * share, 3.0 * share, -1.0 * share]


def test_ties_averages_by_the_size_of_weights() -> None:
    found = tasks([4.0, 1.0, 3.0], [2.0, -3.0, -1.0], weights=[1.0, -3.0])
    # Turned around: 4, 1, 3 and -6, 9, 3. Elected: -, +, +.
    assert vector("ties", found, density=1.0) == [-2.0, 2.5, 1.5]


def test_sce_of_one_model_selects_nothing_unless_everything_is_kept() -> None:
    assert vector("sce", tasks([4.0, -3.0])) == [0.0, 0.0]
    assert vector("sce", tasks([4.0, -3.0]), density=1.0) == [4.0, -3.0]


def test_regmean_averages_where_no_input_was_seen() -> None:
    seen = tuple(Calibration({"m": torch.zeros(2, 2)}, 5) for _ in range(2))
    deltas = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert merged("regmean", Tasks(NAMES[:2], torch.ones(2), {"m": deltas}, seen))["m"].tolist() == [[2.0, 3.0]]


def test_regmean_averages_embeddings_though_a_tied_head_has_moments() -> None:
    seen = tuple(Calibration({"model.embed_tokens.weight": torch.eye(2) * size}, 5) for size in (1.0, 9.0))
    deltas = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    found = Tasks(NAMES[:2], torch.ones(2), {"model.embed_tokens.weight": deltas}, seen)
    assert merged("regmean", found)["model.embed_tokens.weight"].tolist() == [[2.0, 3.0]]


def test_regmean_refuses_weights_below_zero() -> None:
    found = random_model(2)
    turned = Tasks(found.names, torch.tensor([2.0, -1.0]), found.deltas, found.calibrations)
    with pytest.raises(FusionError, match="merge: regmean expects weights .* of at least 0, .*; found -1. Change it"):
        merged("regmean", turned)


@pytest.mark.parametrize("name", ["linear", "task-arithmetic", "ties-tensor", "sce", "breadcrumbs", "della", "dare"])
def test_methods_that_look_at_one_parameter_do_not_see_the_others(name: str) -> None:
    whole = random_model(3)
    alone = Tasks(whole.names, whole.weights, {"norm": whole.deltas["norm"]}, whole.calibrations)
    assert torch.equal(merged(name, whole, density=0.5)["norm"], merged(name, alone, density=0.5)["norm"])


@pytest.mark.parametrize("name", ["ties", "emr", "pcb"])
def test_methods_that_look_at_the_whole_model_give_what_one_long_vector_gives(name: str) -> None:
    parts = random_model(3)
    flat = torch.cat([stack.flatten(1) for stack in parts.deltas.values()], dim=1)
    whole = merged(name, Tasks(parts.names, parts.weights, {"v": flat}), 1, density=0.3)["v"]
    streamed = torch.cat([value.flatten() for value in merged(name, parts, 1, density=0.3).values()])
    assert torch.allclose(whole, streamed, atol=1e-6)


def test_linear_divides_by_the_weights_and_task_arithmetic_does_not() -> None:
    found = tasks([2.0, 0.0], [4.0, 8.0], weights=[1.0, 3.0])
    assert vector("linear", found) == [3.5, 6.0]
    assert vector("task-arithmetic", found, scale=0.5) == [7.0, 12.0]
    with pytest.raises(FusionError, match="merge: expected weights .FILE:WEIGHT. whose sum is not 0, .* found 0. Chan"):
        merged("linear", tasks([1.0], [2.0], weights=[1.0, -1.0]))


def test_ties_trims_whole_models_and_averages_who_agrees_with_the_sum() -> None:
    # Half of four entries: 4, -3 | 5, 2. Elected: + (4 + 5), - (-3), 0 -> majority, + (2).
    found = tasks([4.0, -3.0, 1.0, 0.0], [5.0, 0.5, 0.0, 2.0])
    assert vector("ties", found, density=0.5) == [4.5, -3.0, 0.0, 2.0]
    opposed = tasks([3.0, -1.0, -2.0, -2.0], [-3.0, -1.0, -2.0, 0.0])
    assert vector("ties", opposed, density=1.0) == [-3.0, -1.0, -2.0, -2.0]  # a tie goes with most entries: -
    assert vector("ties-tensor", opposed, density=1.0) == [3.0, -1.0, -2.0, -2.0]  # or +, as in mergekit
    weighted = tasks([4.0, 1.0], [2.0, -3.0], weights=[1.0, 3.0])
    assert vector("ties", weighted, density=1.0) == [2.5, -3.0]


def test_dare_keeps_about_the_density_and_what_it_keeps_is_divided_by_it() -> None:
    found = Tasks(("one",), torch.ones(1), {"v": torch.ones(1, 10000)})
    out = merged("dare", found, density=0.25, scale=1.0)["v"]
    assert set(out.tolist()) == {0.0, 4.0}
    assert abs(float(out.mean()) - 1) < 0.1
    again, other = (merged("dare", found, density=0.25, scale=1.0, seed=seed)["v"] for seed in (0, 1))
    assert torch.equal(out, again) and not torch.equal(out, other)


def test_dare_draws_each_task_and_parameter_by_itself() -> None:
    ones = torch.ones(2, 1000)
    found = Tasks(("one", "two"), torch.ones(2), {"v": ones, "w": ones})
    out = merged("dare", found, density=0.5, scale=1.0)
    assert set(out["v"].tolist()) == {0.0, 2.0, 4.0}
    assert not torch.equal(out["v"], out["w"])


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    rows = torch.arange(1.0, 101).repeat(200, 1)[None]
    out = merged("della", Tasks(("one",), torch.ones(1), {"m": rows}), density=0.5)["m"] != 0
    assert abs(float(out[:, -10:].float().mean()) - 0.635) < 0.04  # 0.65 for the largest, 0.62 for the tenth
    assert abs(float(out[:, :10].float().mean()) - 0.365) < 0.04
    assert abs(float(out.float().mean()) - 0.5) < 0.02


def test_breadcrumbs_drop_the_largest_and_the_smallest() -> None:
    values = torch.arange(1.0, 201)[None]
    out = merged("breadcrumbs", Tasks(("one",), torch.ones(1), {"v": values}), density=0.5, scale=1.0)["v"]
    assert out.nonzero().flatten().tolist() == list(range(98, 198))  # the top 2, then 100, then nothing


def test_sce_selects_by_variance_weighs_by_squares_and_erases_the_minority() -> None:
    # Variances: 9, 1, 0, 4. The upper two thirds of three that vary: entries 0 and 3.
    found = tasks([7.0, 3.0, 1.0, -1.0], [1.0, 1.0, 1.0, 3.0])
    # Squares kept: 49 + 1 = 50 and 1 + 9 = 10, so weights 5/6 and 1/6.
    assert vector("sce", found, density=0.67) == [6.0, 0.0, 0.0, 3.0]
    assert vector("sce-fuseai", found, density=0.67) == [6.0, 2.66667, 1.0, 3.0]


def test_pcb_lets_entries_compete() -> None:
    first, second = [1.0, 0.5, -0.2, 0.1, 0.3], [0.8, -0.5, -0.4, 0.1, 0.6]
    out = vector("pcb", tasks(first, second), density=0.4)
    clipped = [[0.5, 0.5, -0.2, 0.1, 0.3], [0.6, -0.5, -0.4, 0.1, 0.6]]  # each model's largest to its next
    sums = [a + b for a, b in zip(first, second, strict=True)]
    scores = []
    for values, whole in zip(clipped, (first, second), strict=True):
        low, high = min(map(abs, values)), max(map(abs, values))
        spread = [(abs(c) - low) / (high - low) for c in values]
        scores.append([math.exp(2 * s * s) * math.tanh(v * t) for s, v, t in zip(spread, whole, sums, strict=True)])
    competing = []
    for row in scores:
        weakest, strongest = sorted(row)[3], max(row)
        competing.append([max(0, value - weakest) / (strongest - weakest) for value in row])
    expected = []
    for i in range(5):
        total = competing[0][i] + competing[1][i]
        expected.append(sum(w[i] * c[i] for w, c in zip(competing, clipped, strict=True)) / max(total, 1e-12))
    assert out == [round(value, 5) for value in expected]
    assert sum(value != 0 for value in out) == 1


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_pcb_takes_more_models_than_float32_has_exponents(size: float) -> None:
    deltas = size * torch.randn(100, 500, generator=torch.Generator().manual_seed(0))
    found = merged("pcb", Tasks(tuple(map(str, range(100))), torch.ones(100), {"v": deltas}))["v"]
    assert bool(found.isfinite().all()) and float(found.abs().max()) > size


def test_regmean_has_the_least_error_on_the_inputs_of_both() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, 4, generator=draw) * scale for scale in (torch.tensor([3.0, 1, 1, 1]), torch.ones(4))]
    # Moments without correlations are not changed by the guard, so the answer is that of least squares.
    inputs = [torch.linalg.qr(x).Q * x.norm(dim=0) for x in inputs]
    deltas = torch.randn(2, 3, 4, generator=draw)
    seen = tuple(Calibration({"m": x.T @ x / 50}, 50) for x in inputs)
    out = merged("regmean", Tasks(NAMES[:2], torch.ones(2), {"m": deltas}, seen))["m"]
    stacked = torch.cat(inputs), torch.cat([x @ d.T for x, d in zip(inputs, deltas, strict=True)])
    assert torch.allclose(out, torch.linalg.lstsq(*stacked).solution.T, atol=1e-4)
    turned = tuple(Calibration(one.moments, 50, frozenset({"m"})) for one in seen)
    again = merged("regmean", Tasks(NAMES[:2], torch.ones(2), {"m": deltas.mT.contiguous()}, turned))["m"]
    assert torch.allclose(again.mT, out, atol=1e-6)


def test_emr_gives_each_task_its_own_entries_of_the_largest_that_agree() -> None:
    found = tasks([3.0, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, -2.0])
    # Signs of the means: +, +, +, 0 -> -. Unified: 3, 2, 4, -2.
    assert vector("emr", found, 0) == [6.0, 0.0, 0.0, 0.0]  # mask 1000, rescaled by (3 + 1 + 2) / 3
    second = (1 + 2 + 4 + 2) / (3 + 2 + 4 + 2)
    assert vector("emr", found, 1) == [round(second * value, 5) for value in (3.0, 2.0, 4.0, -2.0)]


def test_tall_masks_keep_what_stands_out_and_the_consensus_what_two_keep() -> None:
    found = tasks([1.0, 0.1, 0.0], [0.9, 1.0, 0.0], [1.0, 0.0, 1.0])
    # Sums: 2.9, 1.1, 1.0. |delta| > 0.4 |sum - delta|: for 0: yes, no, no; for 1: yes, yes, no; for 2: yes, no, yes.
    assert vector("tall-mask", found, 0, threshold=0.4) == [2.9, 0.0, 0.0]
    assert vector("tall-mask", found, 1, threshold=0.4) == [2.9, 1.1, 0.0]
    assert vector("consensus", found, threshold=0.4, scale=0.5) == [1.45, 0.0, 0.0]


def test_twin_adds_to_the_shared_part_what_a_rank_holds_of_the_rest() -> None:
    found = Tasks(NAMES[:2], torch.ones(2), {"m": torch.diag_embed(torch.tensor([[4.0, 1, 0, 0], [0.0, 0, 0, 2]]))})
    out = merged("twin", found, 0, rank=1, scale=0.5)["m"]  # shared 2, .5, 0, 1; the rest 2, .5, 0, -1
    assert torch.allclose(out, torch.diag(torch.tensor([4.0, 0.5, 0.0, 1.0])), atol=1e-6)
    own = merged("routed-lora", found, 0, rank=1)["m"]
    assert torch.allclose(own, torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0])), atol=1e-6)


def test_what_is_kept_is_counted_in_bytes() -> None:
    specs = [TensorSpec("BF16", (10, 30)), TensorSpec("BF16", (20,))]
    assert METHODS["ties"].stored_bytes(specs, 3, 0) == 640
    assert METHODS["emr"].stored_bytes(specs, 3, 0) == 2 * 640 + 3 * (40 + 4)
    assert METHODS["twin"].stored_bytes(specs, 3, rank=2) == 640 + 3 * 2 * (2 * 40 + 20)
    assert METHODS["twin"].stored_bytes(specs, 3, rank=9) == 640 + 3 * 640


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_order_statistics_are_those_of_the_sorted_numbers(parts: list[list[float]], share: float) -> None:
    def look() -> list[Tensor]:
        return [torch.tensor([part, [-value for value in part]]) for part in parts]

    found, total = order_statistics(look, lambda total: [int(share * (total - 1)), total - 1])
    ordered = torch.cat(look(), dim=1).sort(dim=1).values
    assert total == ordered.shape[1]
    assert found.tolist() == ordered[:, [int(share * (total - 1)), total - 1]].tolist()


def test_a_search_finds_weights_near_the_best_within_its_bounds() -> None:
    best = torch.tensor([0.8, -0.3, 1.4])
    seen: list[Tensor] = []

    def loss(weights: Tensor) -> float:
        seen.append(weights)
        return float((weights - best).square().sum())

    found = search_weights(loss, 3, seed=0, evaluations=200)
    assert torch.allclose(found, best, atol=0.15)
    assert len(seen) == 200 and all(bool((one.abs() <= 1.5).all()) for one in seen)
    assert torch.equal(found, search_weights(loss, 3, seed=0, evaluations=200))


def test_a_search_starts_at_the_base_and_stays_there_unless_it_finds_better() -> None:
    seen: list[Tensor] = []
    found = search_weights(lambda weights: seen.append(weights) or 1.0, 3, seed=0)
    assert seen[0].tolist() == found.tolist() == [0.0, 0.0, 0.0]


def test_a_search_charges_the_mean_size_of_the_weights() -> None:
    # Gains 0.02 for each unit of weight: more than 0.05 / 4, less than 0.05.
    found = search_weights(lambda weights: -0.02 * float(weights.abs().sum()), 4, seed=0)
    assert float(found.abs().sum()) > 1
    found = search_weights(lambda weights: -0.01 * float(weights.abs().sum()), 4, seed=0)
    assert found.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "given_knobs", "message"),
    [
        ("ties", {"rank": 3}, "--rank: ties has no such knob, only --density, --scale; leave it out."),
        ("ties", {"density": 0.0}, "--density: expected above 0 and at most 1, found 0."),
        ("linear", {"scale": float("nan")}, "--scale: expected a finite number, found nan."),
    ],
)
def test_knobs_are_checked(name: str, given_knobs: Mapping[str, float], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        METHODS[name].knobs(given_knobs)


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(FusionError, match="--method: expected one of linear, task-arithmetic, .*; found 'tie'"):
        method("tie")
    assert METHODS["dare"].knobs({"seed": 3.0}) == Knobs(scale=0.3, density=0.5, seed=3)
    with pytest.raises(FusionError, match="weight: sce takes none, found 0.5"):
        METHODS["sce"].weight(0.5)
