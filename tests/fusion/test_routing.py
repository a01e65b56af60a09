import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion import routing
from graftllm.fusion.classifier import Calibration, judge, new_network
from graftllm.fusion.examples import keep_examples
from graftllm.fusion.fitting import fit_router
from graftllm.fusion.routing import Router, train_router
from graftllm.recipe import RouterOptions
from graftllm.records import Prompt

QUICK = RouterOptions(steps=60)
NAMES = ("base", "math", "code", "law", "chess")
MANY = ("base", *(f"p{i:02}" for i in range(63)))


def _clusters(count: int = 100, seed: int = 0, names: tuple[str, ...] = NAMES[:3]) -> dict[str, torch.Tensor]:
    """Features of prompts: a cloud for each class, the same clouds for every seed."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(66, 24, generator=torch.Generator().manual_seed(42))
    return {
        name: center * 2 + torch.randn(count, 24, generator=draw) / 2
        for name, center in zip(names, centers, strict=False)
    }


def _accuracy(router: Router, features: dict[str, torch.Tensor]) -> float:
    right = [route.name == name for name, rows in features.items() for route in router.route(rows)]
    return sum(right) / len(right)


def _same(first: Router, second: Router) -> bool:
    states = [list(router.network.state_dict().values()) for router in (first, second)]
    weights = all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    return weights and (first.classes, first.calibration) == (second.classes, second.calibration)


@pytest.fixture(scope="module")
def router() -> Router:
    return train_router(_clusters(), QUICK, seed=0)


@pytest.fixture(scope="module")
def crowd() -> Router:
    """A router of 63 packs."""
    return train_router(_clusters(24, names=MANY), RouterOptions(steps=150), seed=0)


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 9))
def test_kept_examples_are_rows_of_the_features_within_a_127th_of_their_largest(
    width: int, count: int, seed: int
) -> None:
    features = torch.randn(30, width, generator=torch.Generator().manual_seed(seed))
    kept = keep_examples(features, count, count // 2, seed=seed)
    assert len(kept) == min(count, 30)
    apart = torch.cdist(kept.features, features, p=torch.inf).amin(dim=1)
    assert (apart <= kept.scales[:, 0] * 0.51).all()


@settings(max_examples=10)
@given(st.integers(2, 40), st.integers(4, 60), st.integers(0, 9))
def test_examples_cover_rare_kinds_of_prompts_too(width: int, count: int, seed: int) -> None:
    features = torch.randn(500, width, generator=torch.Generator().manual_seed(seed))
    features[17] += 100
    features[400] -= 100
    kept = keep_examples(features, count, count // 2, seed=seed).features
    assert (torch.cdist(features[[17, 400]], kept).amin(dim=1) < 3 * width**0.5).all()


def test_judging_leaves_unsure_and_strange_prompts_to_the_base() -> None:
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0], [0.0, 0.1], [0.0, 9.0]])
    strangeness = torch.tensor([[5.0, 1.0], [1.0, 5.0], [1.0, 1.0], [1.0, 3.0]])
    verdict = judge(logits, strangeness, Calibration(1.0, 0.9, (2.0, 2.0)))
    assert verdict.chosen.tolist() == [1, 0, 0, 0]
    assert verdict.strange.tolist() == [False, False, False, True]


def test_reading_the_likeliest_class_alone_decides_as_reading_all_of_them_does(router: Router) -> None:
    noise = torch.randn(200, 24, generator=torch.Generator().manual_seed(7))
    features = torch.cat([*_clusters(seed=1).values(), *(3 * rows for rows in _clusters(seed=2).values()), noise])
    few, every = (
        judge(*read(features), router.calibration)
        for read in (router.classifier.read_likeliest, router.classifier.read)
    )
    assert every.strange.any()
    assert {0, 1, 2} == set(every.chosen.tolist())
    for found, expected in ((few.chosen, every.chosen), (few.strange, every.strange)):
        assert torch.equal(found, expected)


def test_separable_prompts_are_told_apart(router: Router) -> None:
    assert _accuracy(router, _clusters(seed=1)) > 0.98
    assert router.accuracy > 0.98
    assert (router.classes, router.packs) == (("base", "code", "math"), ("code", "math"))


def test_probabilities_sum_to_one_and_name_every_class(router: Router) -> None:
    route = router.route(_clusters(3)["math"])[0]
    assert sum(route.probabilities.values()) == pytest.approx(1)
    assert list(route.probabilities) == ["base", "code", "math"]
    assert (route.weights, route.reason) == ({"math": 1.0}, "router")


def test_prompts_of_a_kind_never_seen_go_to_the_base(router: Router) -> None:
    strangers = _clusters(names=NAMES)
    for name in ("law", "chess"):
        assert sum(route.name == "base" for route in router.route(strangers[name])) >= 98
    assert {route.reason for route in router.route(strangers["law"])} <= {"unknown", "unsure", "router"}


def test_a_base_of_another_width_is_refused(router: Router) -> None:
    with pytest.raises(FusionError, match=r"^router: expected a base that gives 24 features, .* found 25; run"):
        router.route(torch.zeros(1, 25))


def test_unsure_prompts_go_to_the_base(router: Router) -> None:
    features = _clusters(seed=1)
    between = (features["math"] + features["base"]) / 2
    certain = replace(router, calibration=replace(router.calibration, threshold=0.999999, limits=(1e9,) * 3))
    assert all(route.name == "base" for route in certain.route(between))
    assert "unsure" in {route.reason for route in certain.route(between)}


def test_fresh_general_prompts_go_to_packs_no_more_often_than_stated() -> None:
    options, found = RouterOptions(steps=1, threshold=0, false_accept=0.025), []
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        features = {name: torch.randn(40, 8, generator=draw) for name in ("base", "math")}  # nobody can tell them apart
        router = train_router(features, options, seed=seed)
        assert router.false_accept == 1 / 41
        found.append(mean(route.name != "base" for route in router.route(torch.randn(500, 8, generator=draw))))
    assert 0.01 < mean(found) < 0.035  # one held-out prompt more above the threshold makes it 0.05


def test_how_many_general_prompts_there_are_bounds_what_is_stated() -> None:
    features = _clusters(100) | {"math": _clusters(100, seed=8)["base"]}  # nobody can tell these from general ones
    rates = (1e-9, 0.02, 0.9)
    routers = [train_router(features, RouterOptions(steps=9, threshold=0, false_accept=rate), seed=0) for rate in rates]
    assert [router.false_accept for router in routers[:2]] == [1 / 101, 2 / 101]
    assert routers[0].calibration.threshold > routers[1].calibration.threshold > routers[2].calibration.threshold


@settings(max_examples=10)
@given(st.integers(8, 60), st.integers(0, 9))
def test_the_first_examples_are_a_sample_and_rare_kinds_come_after_them(drawn: int, seed: int) -> None:
    features = torch.zeros(600, 1)
    features[:30] = 100.0
    rare = [int((keep_examples(features, 64, drawn, seed=9 * seed + i).features > 1)[:drawn].sum()) for i in range(40)]
    assert 0.02 * drawn < mean(rare) < 0.08 * drawn  # of 0.05


@pytest.mark.parametrize("seed", range(3))
def test_a_stray_general_prompt_leaves_the_packs_their_own(seed: int) -> None:
    features = _clusters(1200, seed=seed)
    features["base"][seed] = features["math"][seed]
    router = train_router(features, RouterOptions(steps=100), seed=seed)
    assert router.false_accept <= 0.01
    assert router.calibration.threshold < 0.9
    assert _accuracy(router, _clusters(seed=9)) > 0.98


def test_rare_classes_are_learnt_beside_frequent_ones() -> None:
    features = _clusters(400)
    features["code"] = features["code"][:12]
    router = train_router(features, QUICK, seed=0)
    assert sum(route.probabilities["code"] > 0.5 for route in router.route(_clusters(seed=1)["code"])) > 90


def test_packs_that_nobody_can_tell_apart_answer_all_the_same() -> None:
    copies = {f"math-{i}": _clusters(60, seed=10 + i)["math"] for i in range(6)}
    router = train_router({name: _clusters(100)[name] for name in ("base", "code")} | copies, QUICK, seed=0)
    test = _clusters(seed=1)
    routes = router.route(test["math"])
    assert sum(route.name in copies for route in routes) > 95
    assert max(route.probabilities[route.name] for route in routes) < 0.9  # no copy is sure to be the one
    assert sum(route.name == "base" for route in router.route(test["base"])) >= 98
    for soft in (2, 3, 6, 7):
        for route in replace(router, options=QUICK.model_copy(update={"soft": soft})).route(test["math"]):
            assert sum(route.weights.values()) == pytest.approx(float(route.name != "base"))
            assert route.name == "base" or route.name in route.weights
    wary = replace(router, calibration=replace(router.calibration, threshold=0.9999, limits=(1e9,) * 8))
    reasons = {
        route.reason for route in wary.route((test["math"] + test["base"]) / 2) if route.probabilities["base"] < 0.5
    }
    assert reasons == {"unsure"}


def test_soft_routes_share_an_answer_by_probability() -> None:
    features = _clusters(100)
    features["code"] = features["math"] + 0.1  # nobody can tell these two apart
    options = RouterOptions(steps=60, soft=2)
    router = train_router(features, options, seed=0)
    shared = [route.weights for route in router.route(_clusters(seed=1)["math"]) if len(route.weights) == 2]
    assert len(shared) > 10
    for weights in shared:
        assert sum(weights.values()) == pytest.approx(1)
        assert all(round(10 * weight, 6).is_integer() for weight in weights.values())
    assert all(route.weights == {} for route in router.route(_clusters(seed=1)["base"]) if route.name == "base")


# Packs come and go.


def test_a_pack_joins_without_the_old_packs_prompts_and_old_decisions_stay(router: Router) -> None:
    features = _clusters(names=NAMES)
    grown = router
    for name in ("law", "chess"):
        grown = grown.with_pack(name, features[name])
    assert grown.packs == ("chess", "code", "law", "math")
    assert _accuracy(grown, _clusters(seed=1, names=NAMES)) > 0.98
    for name, rows in _clusters(seed=2).items():
        old, new = router.route(rows), grown.route(rows)
        changed = sum(a.name != b.name for a, b in zip(old, new, strict=True))
        assert changed <= QUICK.drift * len(rows), name
    assert set(router.drift(grown)) == {"base", "code", "math"}
    assert max(router.drift(grown).values()) <= QUICK.drift


def test_the_order_in_which_packs_join_does_not_matter(router: Router) -> None:
    features = _clusters(names=NAMES)
    orders = (("law", "chess"), ("chess", "law"))
    first, second = (router.with_pack(a, features[a]).with_pack(b, features[b]) for a, b in orders)
    assert _same(first, second)
    assert _same(first, train_router(features, QUICK, seed=0))


def test_a_pack_that_left_leaves_the_router_from_before_it_came(router: Router, tmp_path: Path) -> None:
    after = router.with_pack("law", _clusters(names=NAMES)["law"]).without("law")
    assert _same(after, router)
    for place, one in (("before", router), ("after", after)):
        one.save(tmp_path / place)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_a_router_that_lost_its_last_pack_sends_all_to_the_base_and_learns_again(
    router: Router, tmp_path: Path
) -> None:
    features = _clusters()
    bare = router.without("math").without("code")
    assert bare.packs == () and bare.accuracy == 1.0
    bare.save(tmp_path / "bare")
    loaded = Router.load(tmp_path / "bare")
    assert {(route.name, route.reason) for route in loaded.route(features["math"])} == {("base", "router")}
    assert _same(loaded.with_pack("code", features["code"], drift=1.0), router.without("math"))


def test_a_pack_that_would_change_old_decisions_is_refused(router: Router) -> None:
    twin = _clusters(seed=7)["math"]
    with pytest.raises(
        FusionError, match=r"with 'twin', .*% of the held-out prompts of 'math' would go elsewhere, and "
    ):
        router.with_pack("twin", twin)
    with pytest.raises(FusionError, match="and 2.0% of any old class's may; .* Leave out prompts of 'twin' that are"):
        router.with_pack("twin", twin, drift=0.02)
    with pytest.raises(
        FusionError, match="or allow more: --drift of `graftllm add`, router.drift in the recipe of `gr"
    ):
        router.with_pack("twin", twin, drift=0)
    tolerant = router.with_pack("twin", twin, drift=1.0)
    assert "twin" in tolerant.packs and tolerant.options == router.options
    assert _same(tolerant.without("twin"), router)


def test_joining_and_leaving_name_what_is_wrong(router: Router) -> None:
    features = _clusters()
    with pytest.raises(FusionError, match="knows the pack 'math' already"):
        router.with_pack("math", features["math"])
    with pytest.raises(FusionError, match="expected at least 8 different prompts of 'law', found 3; add some"):
        router.with_pack("law", features["math"][:3])
    with pytest.raises(FusionError, match="expected one of code, math to remove, found 'law'"):
        router.without("law")
    with pytest.raises(FusionError, match="expected one of none to remove, found 'law'"):
        router.without("math").without("code").without("law")


def test_one_old_pack_of_many_may_not_be_ruined(crowd: Router) -> None:
    fresh = _clusters(24, seed=9, names=(*MANY, "new"))
    with pytest.raises(FusionError, match=r"with 'new', .*% of the held-out prompts of 'p05' would go elsewhere"):
        crowd.with_pack("new", fresh["p05"])
    moved = crowd.drift(crowd.with_pack("new", fresh["p05"], drift=1.0))
    assert mean(moved.values()) < 0.01 < 0.3 < moved["p05"]  # a mean over all would not show it
    assert max(crowd.drift(crowd.with_pack("new", fresh["new"])).values()) <= 1 / 24


def test_one_example_may_move_and_no_more_unless_none_may(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    law = _clusters(names=NAMES)["law"]
    monkeypatch.setattr(Router, "drift", lambda *_: {"base": 0.0, "code": 0.01, "math": 0.0})  # 1 of 100
    assert "law" in router.with_pack("law", law, drift=0.001).packs
    with pytest.raises(FusionError, match=r"with 'law', 1.0% of .* 'code' would go elsewhere, and 0.0% of any"):
        router.with_pack("law", law, drift=0)
    monkeypatch.setattr(Router, "drift", lambda *_: {"base": 0.03, "code": 0.02, "math": 0.0})
    with pytest.raises(FusionError, match=r"with 'law', 3.0% of .* 'base' would go elsewhere, and 1.0% of any"):
        router.with_pack("law", law)


def test_sixty_three_packs_are_told_apart(crowd: Router) -> None:
    assert len(crowd.packs) == 63
    assert _accuracy(crowd, _clusters(10, seed=1, names=MANY)) > 0.95


# Files and seeds.


def test_the_same_seed_trains_the_same_router(router: Router) -> None:
    assert _same(train_router(_clusters(), QUICK, seed=0), router)
    assert not _same(train_router(_clusters(), QUICK, seed=1), router)


def test_the_number_of_threads_changes_no_bit_of_a_router_and_stays_as_it_is(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    features = {name: torch.randn(64, 512, generator=draw) for name in ("base", "one", "two")}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            train_router(features, RouterOptions(steps=20), seed=0).save(tmp_path / "r")
            found.append((tmp_path / "r").read_bytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_router(_clusters(20), RouterOptions(steps=2), seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_a_saved_router_routes_and_grows_the_same(router: Router, tmp_path: Path) -> None:
    router.save(tmp_path / "router.safetensors")
    loaded = Router.load(tmp_path / "router.safetensors")
    assert loaded.route(_clusters(9)["code"]) == router.route(_clusters(9)["code"])
    assert (loaded.calibration, loaded.options, loaded.packs) == (router.calibration, router.options, router.packs)
    assert loaded.false_accept == router.false_accept
    law = _clusters(names=NAMES)["law"]
    assert _same(loaded.with_pack("law", law), router.with_pack("law", law))


@pytest.mark.parametrize("content", [b"", b"text", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_no_router(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FusionError, match="x: not a router of this version"):
        Router.load(tmp_path / "x")


def test_a_router_whose_parts_do_not_fit_is_refused(router: Router, tmp_path: Path) -> None:
    router.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        about, state = file.metadata()["router"], {name: file.get_tensor(name) for name in file.keys()}

    def refused(changed: dict[str, torch.Tensor], told: str, text: str) -> None:
        save_file(changed, tmp_path / "x", metadata={"router": told})
        with pytest.raises(FusionError, match=text):
            Router.load(tmp_path / "x")

    refused(state | {"codes.math": state["codes.math"][:5].clone()}, about, "the examples of 'math' have shapes")
    refused(state | {"found.math": state["found.math"] + 9}, about, "the examples of 'math' go to classes that are not")
    refused(state | {"found.math": state["found.math"] - 9}, about, "the examples of 'math' go to classes that are not")
    refused(state | {"codes.math": state["codes.math"].float()}, about, "the examples of 'math' are .torch.float32, t")
    refused({name: value for name, value in state.items() if name != "scales.code"}, about, "not a router")
    refused(state | {"network.0.weight": state["network.0.weight"] * torch.nan}, about, "expected finite weights")
    refused(state | {"scales.math": torch.full_like(state["scales.math"], 3e38)}, about, "not a router of this version")
    refused(state | {"network.0.weight": torch.zeros(1, 60_000)}, about, "expected at most 512 features, found 60000")
    endless = json.loads(about) | {"options": json.loads(about)["options"] | {"steps": 10**12}}
    refused(state, json.dumps(endless), "should be less than or equal to 100000")
    refused(state, json.dumps(json.loads(about) | {"format": "graftllm/router 1"}), "found graftllm/router 1")
    refused(state, json.dumps(json.loads(about) | {"classes": ["base", "math"]}), "not a router of this version")


def test_classes_that_the_weights_do_not_have_take_no_memory(
    router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(*args: Any, **options: Any) -> torch.nn.Sequential:
        networks.append(new_network(*args, **options))
        return networks[-1]

    networks: list[torch.nn.Sequential] = []
    monkeypatch.setattr(routing, "new_network", traced)
    router.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        about, state = json.loads(file.metadata()["router"]), {name: file.get_tensor(name) for name in file.keys()}
    about["classes"] = ["base", *map(str, range(100_000))]
    for weight in (state["network.2.weight"], torch.zeros(100_001, 0)):
        save_file(state | {"network.2.weight": weight}, tmp_path / "x", metadata={"router": json.dumps(about)})
        with pytest.raises(FusionError, match="size mismatch for 2.weight"):
            Router.load(tmp_path / "x")
    assert [network.get_parameter("2.weight").is_meta for network in networks] == [True, True]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ([], "x: not a router of this version .expected the format graftllm/router 3, found list.. Train it again"),
        ({"classes": ["math", "base", "code"]}, "expected base and then different packs as classes, found .'math', 'b"),
        ({"classes": ["base", "math", "math"]}, "expected base and then different packs as classes, found .'base', 'm"),
        ({"classes": 3}, "x: not a router of this version .'int' object is not iterable"),
        ({"calibration": {"limits": []}}, "expected a calibration of finite numbers, with 3 limits; found"),
        ({"calibration": {"temperature": "x"}}, "x: not a router of this version .could not convert string to float"),
        ({"calibration": {"temperature": 0}}, "expected a calibration of finite numbers"),
        ({"calibration": {"threshold": None}}, "x: not a router of this version .float.* argument must be"),
        ({"calibration": {"threshold": float("nan")}}, "expected a calibration of finite numbers"),
        ({"seed": float("inf")}, "x: not a router of this version .cannot convert float infinity to integer"),
        ({"calibration": []}, "x: not a router of this version"),
    ],
)
def test_a_router_that_tells_nonsense_of_itself_is_refused(
    router: Router, tmp_path: Path, change: dict[str, Any] | list[Any], text: str
) -> None:
    router.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="pt") as file:
        about, state = json.loads(file.metadata()["router"]), {name: file.get_tensor(name) for name in file.keys()}
    told = about | change if isinstance(change, dict) else change
    if isinstance(change, dict) and isinstance(change.get("calibration"), dict):
        told["calibration"] = about["calibration"] | change["calibration"]
    save_file(state, tmp_path / "x", metadata={"router": json.dumps(told)})
    with pytest.raises(FusionError, match=text):
        Router.load(tmp_path / "x")


def test_prompts_of_one_kind_only_are_refused(base: Checkpoint, prompts: list[Prompt]) -> None:
    with pytest.raises(FusionError, match="expected prompts of 'base' and of at least one pack, found math"):
        fit_router(base.path, {"math": prompts})
    with pytest.raises(FusionError, match="found none"):
        fit_router(base.path, {})
    with pytest.raises(FusionError, match="at least 8 different prompts of 'math', found 2 in 40 rows; add some"):
        fit_router(base.path, {"base": prompts, "math": prompts[:2] * 20})
