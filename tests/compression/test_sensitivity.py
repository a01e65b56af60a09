import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from graftllm.checkpoint import Checkpoint
from graftllm.compression import sensitivity
from graftllm.compression.calibration import collect_moments
from graftllm.compression.experts import Slice, slices_of
from graftllm.compression.measures import Measures, load_measures, save_measures
from graftllm.compression.metric import shrunk
from graftllm.compression.prices import DAMPING, Calibration, Sensitivity
from graftllm.compression.sensitivity import answered, measure_sensitivity, to_calibrate
from graftllm.delta import Delta
from graftllm.live import bindings
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Message, Prompt
from graftllm.rendering import context_length, render_answered
from tests.architectures import save_base, save_tuned
from tests.models import rows, save_llama, tokenizer

_INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # the first that gets each
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Model:
    path: Path
    live: nn.Module
    prompts: list[Prompt]
    measures: Measures

    def metric_cost(self, name: str, error: Tensor) -> float:
        return self.measures.metric(name, tuple(error.shape)).cost(error.double())

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.live.named_parameters() if value.ndim == 2)


def _measured(path: Path, prompts: list[Prompt]) -> Measures:
    found, weights = measure_sensitivity(path, prompts)
    return Measures(collect_moments(path, prompts, weights=weights), found)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("sensitivity") / "model"
    save_llama(path, dtype=torch.float32, tie_word_embeddings=request.param)
    prompts = rows(40)
    measures = _measured(path, prompts)
    return Model(path, load_model(path).float().eval(), prompts, measures)


@torch.inference_mode()
def _predictions(model: Model) -> Tensor:
    """Log-probabilities at every place whose next token is one of an answer."""
    words, found = load_tokenizer(model.path), []
    for row in model.prompts:
        ids, first = render_answered(words, row)
        logits = model.live(input_ids=torch.tensor([ids])).logits[0]
        found.append(logits[first - 1 : len(ids) - 1].double().log_softmax(-1))
    return torch.cat(found)


def _divergence(model: Model, before: Tensor, value: nn.Parameter, error: Tensor) -> float:
    """KL, in nats a token, when a parameter is off by an error."""
    kept = value.data.clone()
    value.data += error
    after = _predictions(model)
    value.data.copy_(kept)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_costs_foresee_the_divergence_that_noise_in_any_matrix_causes(model: Model) -> None:
    before, foreseen, measured = _predictions(model), {}, {}
    for name, value in model.matrices():
        error = 0.003 * value.detach().std() * torch.randn(value.shape)
        foreseen[name] = model.metric_cost(name, error)
        measured[name] = _divergence(model, before, value, error)
        assert measured[name] / 4 < foreseen[name] < 4 * measured[name], name
    orders = [sorted(costs, key=costs.get) for costs in (foreseen, measured)]
    assert max(measured.values()) > 30 * min(measured.values())  # there is something to tell apart
    places = torch.tensor([[order.index(name) for name in foreseen] for order in orders]).double()
    assert float(torch.corrcoef(places)[0, 1]) > 0.85


def test_answers_that_a_model_is_sure_of_have_a_price(tmp_path: Path) -> None:
    path, prompts = tmp_path / "model", rows(40)
    save_llama(path, dtype=torch.float32, tie_word_embeddings=False)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] *= 60
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    logits = _predictions(Model(path, load_model(path).float().eval(), prompts, Measures()))
    assert logits.exp().amax(-1).median() > 0.999

    def price(temperature: float) -> float:  # of what the head gives: the variance of the answer that is drawn
        chances = (logits / temperature).softmax(-1)
        return float(0.5 * (chances * (1 - chances)).sum(-1).mean())

    assert price(2) > 2 * price(1)
    found = float(measure_sensitivity(path, prompts)[0].outputs["lm_head.weight"].sum())
    assert found == pytest.approx(price(2), rel=0.2)


def test_costs_grow_with_the_square_of_the_error(model: Model) -> None:
    error = torch.randn(64, 32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert model.metric_cost(name, 3 * error) == pytest.approx(9 * model.metric_cost(name, error))


def test_a_tied_embedding_counts_as_what_reads_and_as_what_predicts(model: Model) -> None:
    found, moments = model.measures.sensitivity, model.measures.calibration.moments
    tied = model.live.config.tie_word_embeddings
    assert (EMBEDDING in found.outputs, EMBEDDING in found.reads) == (tied, True)
    head = EMBEDDING if tied else "lm_head.weight"
    metric = found.metric(EMBEDDING, moments.get(EMBEDDING))
    if not tied:
        assert head in found.outputs
        assert metric.scale == pytest.approx(_mean_cost(found.reads[EMBEDDING], found.read_outputs[EMBEDDING]))
        return
    parts = (found.outputs[head], moments[head]), (found.reads[head], found.read_outputs[head])
    assert metric.scale == pytest.approx(sum(_mean_cost(*part) for part in parts))


def _mean_cost(per_row: Tensor, right: Tensor) -> float:
    return float(per_row.mean() * right.diagonal().mean())


def test_words_that_are_never_read_nor_predicted_cost_little(model: Model) -> None:
    used = {i for row in model.prompts for i in render_answered(load_tokenizer(model.path), row)[0]}
    per_row = model.measures.sensitivity.metric(EMBEDDING, model.measures.calibration.moments.get(EMBEDDING)).rows
    unused = [i for i in range(len(per_row)) if i not in used]
    assert per_row[unused].max() < 0.5 * per_row[sorted(used)].mean()
    assert per_row.min() > 0
    assert float(per_row.mean()) == pytest.approx(1)


def _of_many_lengths() -> list[Prompt]:
    answer = Message(role="assistant", content="yes")
    return [
        Prompt(str(i), (Message(role="user", content="word " * i), *((answer,) if i % 3 else ()))) for i in range(1, 12)
    ]


def test_padding_does_not_count(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def likeliest(chances: Tensor, *_: object, **__: object) -> Tensor:
        return chances.argmax(-1, keepdim=True)  # draws would depend on the batches

    monkeypatch.setattr(torch, "multinomial", likeliest)
    together, weights = measure_sensitivity(model.path, _of_many_lengths())
    monkeypatch.setattr(sensitivity, "_BATCH", 1)
    alone, same = measure_sensitivity(model.path, _of_many_lengths())
    for field in ("outputs", "reads", "read_outputs"):
        first, second = getattr(together, field), getattr(alone, field)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.allclose(value, second[name], rtol=1e-3, atol=1e-5 * float(value.max())), (field, name)
    assert together.reads[EMBEDDING][0] == 0  # the padding token's
    assert weights.keys() == same.keys()
    for name, of_rows in weights.items():
        for first, second in zip(of_rows, same[name], strict=True):
            assert torch.allclose(first, second, rtol=1e-2, atol=1e-4), name


def test_tokens_count_as_much_as_the_gradients_of_the_layers_that_share_an_input(model: Model) -> None:
    prompts = _of_many_lengths()
    _, weights = measure_sensitivity(model.path, prompts)
    layers = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in _INPUTS]
    assert weights.keys() == {*layers, EMBEDDING if model.live.config.tie_word_embeddings else "lm_head.weight"}
    words = load_tokenizer(model.path)
    lengths = [len(render_answered(words, row)[0]) for row in prompts]
    for name, of_rows in weights.items():
        assert [len(row) for row in of_rows] == lengths
        every = torch.cat(list(of_rows))
        assert every.min() >= 0
        assert float(every.mean()) == pytest.approx(1)
        assert all(row[-1] == 0 for row in of_rows), name  # no token is predicted after the last
    head = weights[next(name for name in weights if name not in layers)]
    first = render_answered(words, prompts[0])[1]
    assert prompts[0].messages[-1]["role"] == "assistant"
    assert not head[0][: first - 1].any()  # the question is not predicted
    assert head[0][first - 1 : -1].all()


def test_moments_count_each_token_by_its_weight(model: Model) -> None:
    prompts = _of_many_lengths()
    _, weights = measure_sensitivity(model.path, prompts)
    words, layer = load_tokenizer(model.path), "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    hook = model.live.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for row in prompts:
            model.live(input_ids=torch.tensor([render_answered(words, row)[0]]))
    hook.remove()
    x, w = torch.cat(seen), torch.cat(list(weights[f"{layer}.weight"]))
    found = collect_moments(model.path, prompts, weights=weights).moments[f"{layer}.weight"]
    expected = (x * w[:, None]).T @ x / len(x)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert not torch.allclose(collect_moments(model.path, prompts).moments[f"{layer}.weight"], expected, rtol=0.05)


def test_calibration_reads_few_rows_and_few_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    words, prompts = load_tokenizer(model.path), rows(40)
    monkeypatch.setattr(sensitivity, "SEQUENCES", 30)
    few = to_calibrate(words, model.live, prompts)
    assert few == answered(words, prompts[:30])
    lengths = [len(ids) for ids, _ in few]
    monkeypatch.setattr(sensitivity, "_TOKENS", sum(lengths[:7]))
    assert to_calibrate(words, model.live, prompts) == few[:7]
    monkeypatch.setattr(sensitivity, "_TOKENS", 1)
    assert to_calibrate(words, model.live, prompts) == few[:1]


def test_calibration_reads_as_far_as_the_model_was_made_to(model: Model) -> None:
    long = Prompt("0", (Message(role="user", content="a" * 999),))
    most = context_length(model.live)
    assert most == 256
    words = load_tokenizer(model.path)
    (whole,) = answered(words, [long])
    parts = to_calibrate(words, model.live, [long])
    assert [len(ids) for ids, _ in parts] == [most, most, most, len(whole[0]) - 3 * most]
    assert [token for ids, _ in parts for token in ids] == whole[0]  # text is read in parts
    told = replace(long, reference="b" * 400)
    assert [len(ids) for ids, _ in to_calibrate(words, model.live, [told])] == [most]  # an answer is cut


def test_reads_are_half_a_token_of_each_row_of_the_vocabulary(model: Model) -> None:
    words, prompts = load_tokenizer(model.path), _of_many_lengths()
    rendered = [render_answered(words, row) for row in prompts]
    predicted = sum(len(ids) - (first if first < len(ids) else 1) for ids, first in rendered)
    counts = torch.bincount(torch.tensor([i for ids, _ in rendered for i in ids]), minlength=len(words)).float()
    found = measure_sensitivity(model.path, prompts)[0].reads[EMBEDDING]
    assert torch.allclose(found, 0.5 * counts / predicted)


def test_the_same_rows_give_the_same_sensitivity(model: Model) -> None:
    first, second = (measure_sensitivity(model.path, model.prompts[:9])[0] for _ in range(2))
    for name, value in first.outputs.items():
        assert torch.equal(value, second.outputs[name])


@pytest.mark.parametrize("name", ["gpt2", "mamba", "bamba"])
def test_what_is_used_without_a_layer_that_can_be_watched_has_a_price(name: str, tmp_path: Path) -> None:
    path, prompts = save_base(name, tmp_path / "model", dtype=torch.float32), rows(40)
    model = Model(path, load_model(path).float().eval(), prompts, _measured(path, prompts))
    before, found = _predictions(model), []
    for key, value in model.live.named_parameters():
        if re.search(r"wpe|conv1d.weight|A_log", key) and value.ndim > 1:
            error = 0.003 * value.detach().std() * torch.randn(value.shape)
            foreseen = model.measures.metric(key, tuple(value.shape)).cost(error.flatten(1).double())
            measured = _divergence(model, before, value, error)
            assert measured / 4 < foreseen < 4 * measured, key
            found.append(key)
    assert len(found) == {"gpt2": 1, "mamba": 4, "bamba": 1}[name]


def test_where_nothing_was_measured_an_error_costs_what_it_does_in_others_of_its_kind() -> None:
    outputs = {"0.a": torch.tensor([1.0, 3.0]), "1.a": torch.tensor([4.0]), "0.b": torch.tensor([9.0])}
    eye = {"0.a": torch.eye(2), "1.a": 2 * torch.eye(2), "0.b": torch.eye(2)}
    found = Measures(Calibration(eye, 1, unseen=frozenset({"3.a"})), Sensitivity(outputs, {}, {}))
    same = found.metric("2.a", (2, 3))
    assert (same.scale, same.rows, same.right) == ((2 + 8) / 2, None, None)
    assert found.metric("c", (2, 3)).scale == pytest.approx((2 + 8 + 9) / 3)
    assert found.metric("3.a", (2, 3)).scale == pytest.approx(DAMPING * 5)
    assert Measures(None, Sensitivity({}, {}, {})).metric("c", (2, 3)).scale == 1.0


def test_second_moments_of_few_tokens_are_shrunk_by_how_many_reached_the_layer(tmp_path: Path) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    moments = {name: x.T @ x / 4 for name in ("few", "many", "exact")}
    found = Measures(Calibration(moments, 4, reached={"few": 4, "many": 4_000_000}))
    save_measures(found, tmp_path / "measures.safetensors")
    for known in (found, load_measures(tmp_path / "measures.safetensors")):
        few, many, exact = (known.moments(name, (2, 8)) for name in moments)
        torch.testing.assert_close(few, shrunk(moments["few"], 4))
        torch.testing.assert_close(many, moments["many"], rtol=1e-4, atol=1e-4)
        assert exact is not None and exact.equal(moments["exact"])


def test_an_expert_that_only_last_tokens_reached_costs_as_little_as_one_that_none_did() -> None:
    outputs = {"0.a": torch.tensor([3.0, 5.0]), "1.a": torch.zeros(2)}
    found = Measures(Calibration({"0.a": torch.eye(3), "1.a": torch.eye(3)}, 1), Sensitivity(outputs, {}, {}))
    assert found.metric("0.a", (2, 3)).scale == 4
    assert found.metric("1.a", (2, 3)).scale == pytest.approx(DAMPING * 2)


def test_experts_that_no_token_reached_take_no_bytes_from_those_that_some_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=16, num_experts_per_tok=1, moe_intermediate_size=32,
        decoder_sparse_step=1, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    delta = Delta(Checkpoint.open(tmp_path / "base"), Checkpoint.open(save_tuned(tmp_path / "base", tmp_path / "t")))
    pack = compress(delta, PackOptions(budget="9%"), calibration=rows(12), device="cpu")
    taken: dict[bool, list[int]] = {True: [], False: []}
    for name, entry in pack.header.tensors.items():
        if ".experts." in name:
            taken[entry.unseen].append(entry.nbytes)
    assert min(map(len, taken.values())) > 5
    means = {unseen: sum(found) / len(found) for unseen, found in taken.items()}
    assert means[True] < 0.5 * means[False]


_STACKED = GraniteMoeConfig(
    vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2, pad_token_id=0,
    bos_token_id=1, eos_token_id=3, num_experts=4,
)  # fmt: skip


@pytest.fixture(scope="module", params=["one by one", "in a stack", "inputs first"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A mixture of experts, which its checkpoint holds as a matrix each, or as one tensor a layer."""
    path, prompts = tmp_path_factory.mktemp("mixture") / "model", rows(40)
    if request.param != "in a stack":
        save_base("gpt_oss" if request.param == "inputs first" else "qwen3_moe", path, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        GraniteMoeForCausalLM(_STACKED).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return Model(path, load_model(path).float().eval(), prompts, _measured(path, prompts))


def _experts(model: Model) -> Iterator[tuple[str, nn.Parameter, int, Slice]]:
    specs = Checkpoint.open(model.path).specs
    parameters = dict(model.live.named_parameters())
    for binding in bindings(model.live, specs):
        live = binding.live[0]
        if live in parameters and parameters[live].ndim == 3:
            for i, part in enumerate(slices_of(binding, live, specs)):
                yield from ((name, parameters[live], i, part) for name in part.stored)


def test_each_row_of_a_stack_is_found_where_it_is_stored(mixture: Model) -> None:
    checkpoint, found = Checkpoint.open(mixture.path), list(_experts(mixture))
    for name, value, i, part in found:
        stored, here = part.rows[name]
        assert torch.equal(checkpoint.tensor(name).flatten(0, -2)[stored], value[i][here])
    assert {name for name, *_ in found} == {
        name for name in checkpoint.specs if re.search(r"experts\.\d|put_linear|experts.\w+_proj$", name)
    }


def test_costs_foresee_the_divergence_that_noise_in_any_expert_causes(mixture: Model) -> None:
    before, specs = _predictions(mixture), Checkpoint.open(mixture.path).specs
    reached = mixture.measures.sensitivity.reached
    foreseen, measured = [], []
    for name, value, i, part in _experts(mixture):
        stored, here = part.rows[name]
        noise = torch.zeros(value.shape)  # so small that no token goes to another expert
        noise[i, here] = 0.001 * value.detach().std() * torch.randn(len(here), value.shape[2])
        error = torch.zeros(specs[name].shape).flatten(0, -2)
        error[stored] = noise[i, here]
        foreseen.append(mixture.metric_cost(name, error))
        measured.append(_divergence(mixture, before, value, noise))
        if reached.get(name, 1) > 0.02:  # else too few tokens to tell
            assert measured[-1] / 4 < foreseen[-1] < 4 * measured[-1], (name, i)
    logs = torch.tensor([foreseen, measured]).log()
    assert float(torch.corrcoef(logs)[0, 1]) > 0.9


def test_weights_that_lie_on_their_side_are_measured_as_well(tmp_path: Path) -> None:
    path = save_base("gpt2", tmp_path / "model")
    prompts = _of_many_lengths()
    measures = _measured(path, prompts)
    name = next(name for name in measures.calibration.transposed if "c_fc" in name)
    d_in, d_out = Checkpoint.open(path).specs[name].shape
    metric = measures.metric(name, (d_in, d_out))
    assert metric.right.shape == (d_in, d_in)
    assert metric.rows.shape == (d_out,)
