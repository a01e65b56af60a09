import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForSequenceClassification

from graftllm import packer
from graftllm.checkpoint import Checkpoint
from graftllm.compression import distillation
from graftllm.compression.elementwise import encode_elementwise
from graftllm.compression.factored import MatrixCode, encode_factored, encode_hybrid, weighted_svd
from graftllm.compression.metric import Metric
from graftllm.delta import Delta
from graftllm.errors import CheckpointError, CompressionError
from graftllm.evaluation.fidelity import measure_fidelity
from graftllm.fusion.grafting import plug
from graftllm.loading import load_model
from graftllm.packer import compress, compress_to
from graftllm.packing_options import PackOptions
from graftllm.records import read_prompts
from graftllm.skillpack import SkillPack
from tests.architectures import save_base
from tests.conftest import TinyRun
from tests.models import perturb, rows, save_llama, with_head

_DISTILLED = PackOptions(budget="16%", distill=60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Delta:
    home = tmp_path_factory.mktemp("distilled")
    base = save_llama(home / "base", dtype=torch.float32, num_hidden_layers=1)
    return Delta(Checkpoint.open(base), Checkpoint.open(perturb(base, home / "tuned", seed=1)))


@pytest.fixture(scope="module")
def distilled(tiny: Delta) -> SkillPack:
    return compress(tiny, _DISTILLED, calibration=rows(200), device="cpu")


def _coded() -> list[tuple[MatrixCode, np.ndarray]]:
    torch.manual_seed(0)
    delta, metric = torch.randn(24, 4) @ torch.randn(4, 40) + 0.3 * torch.randn(24, 40), Metric()
    directions = weighted_svd(delta, metric, 6)[1:]
    factored, hybrid = (encode(delta, 0.5, metric, directions) for encode in (encode_factored, encode_hybrid))
    assert factored is not None
    assert hybrid is not None
    return [encode_elementwise(lambda start, stop: delta[start:stop], (24, 40), 0.5, metric), factored, hybrid]


@pytest.mark.parametrize(("operator", "payload"), _coded(), ids=["elementwise", "factored", "hybrid"])
def test_levels_make_the_matrix_and_go_back_into_the_same_payload(operator: MatrixCode, payload: np.ndarray) -> None:
    levels = operator.levels(payload, (24, 40))
    assert torch.equal(operator.joined([one.values() for one in levels]), operator.matrix(payload, (24, 40)))
    again, recoded = operator.recoded(payload, (24, 40), [one.codes for one in levels])
    assert again == operator
    assert np.array_equal(recoded, payload)


@given(st.integers(0, 2**32 - 1))
def test_other_codes_are_decoded_as_they_were_given(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for operator, payload in _coded():
        levels = operator.levels(payload, (24, 40))
        codes = [draw.integers(-9, 9, one.codes.shape, np.int32) for one in levels]
        again, recoded = operator.recoded(payload, (24, 40), codes)
        values = [one.values(torch.from_numpy(other).float()) for one, other in zip(levels, codes, strict=True)]
        assert torch.equal(again.matrix(recoded, (24, 40)), operator.joined(values))


def test_distilled_packs_are_closer_on_prompts_that_they_never_saw_and_not_larger(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    home = tiny_run.directory
    tuned = home / "skills" / "double"
    delta = Delta(Checkpoint.open(home / "zoo" / "target"), Checkpoint.open(tuned / "tuned"))
    learnt, unseen = read_prompts(tuned / "sft.jsonl"), read_prompts(home / "zoo" / "prompts" / "double.test.jsonl")
    found, sizes = [], []
    for steps in (None, 120):
        pack = compress(delta, PackOptions(budget="2%", distill=steps), calibration=learnt, device="cpu")
        found.append(measure_fidelity(delta.base, pack, delta.tuned, unseen).kl)
        pack.save(tmp_path / "pack.safetensors")
        sizes.append((tmp_path / "pack.safetensors").stat().st_size)
    assert found[1] < 0.9 * found[0]
    assert sizes[1] <= 1.002 * sizes[0]  # headers differ by a few bytes
    assert sizes[1] <= 0.02 * delta.tuned.nbytes


def test_a_head_that_is_saved_besides_its_embedding_is_trained_with_it(tiny: Delta, tmp_path: Path) -> None:
    base, tuned = (with_head(one.path, tmp_path / one.name) for one in (tiny.base, tiny.tuned))
    for one in (tiny.base.path, base):
        delta = Delta(Checkpoint.open(one), Checkpoint.open(tuned))
        pack = compress(delta, PackOptions(budget="6KB", distill=24), calibration=rows(8), device="cpu")
        assert list(pack) == list(delta)
        for head, embedding in delta.tied.items():
            assert torch.equal(*(pack.restore(name, delta.base.tensor(name)) for name in (head, embedding)))


def test_the_header_tells_the_steps_and_the_errors_that_are(tiny: Delta, distilled: SkillPack) -> None:
    assert distilled.header.options.distill == 60
    for name, entry in distilled.header.tensors.items():
        base = tiny.base.tensor(name)
        error = (distilled.delta(name, base) - tiny[name]).norm() / tiny[name].norm()
        assert entry.error == pytest.approx(float(error), abs=1e-4)


def test_the_student_is_the_packed_model(tiny: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained gives the logits that the pack gives when it is plugged."""
    ids, found = torch.tensor([[1, 4, 6, 7]]), []
    train = distillation._Student.train

    def watched(student: distillation._Student, attempt: int, price: float) -> None:
        train(student, attempt, price)
        weights = student.fixed | {matrix.live: matrix.value() for matrix in student.matrices}
        found.append(torch.func.functional_call(student.model, weights, (), {"input_ids": ids}).logits)

    monkeypatch.setattr(distillation._Student, "train", watched)
    pack = compress(tiny, _DISTILLED, calibration=rows(40), device="cpu")
    model: nn.Module = load_model(tiny.base.path, device="cpu")
    with plug(model, pack), torch.inference_mode():
        logits = model(input_ids=ids).logits
    assert torch.allclose(logits, found[-1], atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen3_moe", "mamba"])
def test_other_architectures_learn_too(architecture: str, tmp_path: Path) -> None:
    base = save_base(architecture, tmp_path / "base", dtype=torch.float32)
    delta = Delta(Checkpoint.open(base), Checkpoint.open(perturb(base, tmp_path / "tuned", seed=1, scale=0.3)))
    plain, pack = (
        compress(delta, PackOptions(distill=steps), calibration=rows(40), device="cpu") for steps in (None, 24)
    )
    learnt = {name for name in pack if not np.array_equal(pack.encoded(name).payload, plain.encoded(name).payload)}
    assert learnt
    for name in (name for name in pack if "experts" in name):  # transformers stacks them when it loads
        assert pack.header.tensors[name] == plain.header.tensors[name]
    assert pack.payload_bytes <= plain.payload_bytes


_PACK = """
import sys
from pathlib import Path
from graftllm.checkpoint import Checkpoint
from graftllm.compression import distillation
from graftllm.delta import Delta
from graftllm.packer import compress_to
from graftllm.packing_options import PackOptions
from tests.conftest import TinyRun
from tests.models import rows

save = distillation._Student._save

def stop(*given):
    save(*given)
    print("stopped", flush=True)
    sys.stdin.read()  # until killed

distillation._Student._save = stop
delta = Delta(Checkpoint.open(sys.argv[1]), Checkpoint.open(sys.argv[2]))
compress_to(Path(sys.argv[3]), delta, PackOptions(budget="16%", distill=60), calibration=rows(200), device="cpu")
"""


def test_a_killed_training_goes_on_and_gives_the_same_bytes(
    tiny: Delta, distilled: SkillPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, undisturbed = tmp_path / "killed.safetensors", tmp_path / "undisturbed.safetensors"
    command = [sys.executable, "-c", _PACK, str(tiny.base.path), str(tiny.tuned.path), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"stopped\n"
        one.send_signal(signal.SIGKILL)
    batches: list[int] = []
    loss = distillation._Student._loss
    monkeypatch.setattr(
        distillation._Student, "_loss", lambda student, number: batches.append(number) or loss(student, number)
    )
    compress_to(out, tiny, _DISTILLED, calibration=rows(200), device="cpu")
    assert [number for number in batches if number >= 0] == list(range(50, 60))
    distilled.save(undisturbed)
    assert out.read_bytes() == undisturbed.read_bytes()


def test_the_price_of_a_bit_follows_what_codes_will_take() -> None:
    correction, full = distillation._correction, distillation._FULL
    assert correction(full, full, falls=True) == pytest.approx(1)
    assert correction(1.1, 1.0, falls=True) == 2  # foreseen: 1.3 of the room
    assert correction(0.8, 0.8, falls=True) == 0.5
    assert correction(0.8, 0.8, falls=False) == 1
    assert 0.5 < correction(0.97, 0.97, falls=True) < 1 < correction(1.0, 1.0, falls=True) < 2


def test_distilled_bytes_do_not_depend_on_the_number_of_workers(
    tiny: Delta, distilled: SkillPack, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "one.safetensors")
    compress(tiny, _DISTILLED, calibration=rows(200), device="cpu", workers=2).save(tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_codes_are_trained_once(tiny: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(distillation, "distill_job", lambda job, parts, rows: sizes.append(len(parts)) or parts)
    compress(tiny, _DISTILLED, calibration=rows(8), device="cpu")
    assert len(sizes) == 1


def test_without_rows_there_is_nothing_to_learn_from(tiny: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "encode_job", lambda *_, **__: pytest.fail("coded before that is told"))
    with pytest.raises(CompressionError, match=r"distill: .* there are none. Give some \(--calibration\)"):
        compress(tiny, _DISTILLED, device="cpu")


def test_a_classifier_has_no_answers_to_learn(tmp_path: Path) -> None:
    base = Checkpoint.open(save_base("llama", tmp_path, kind=AutoModelForSequenceClassification))
    with pytest.raises(CheckpointError, match="distill: compares next tokens, .* is a LlamaForSequence.* Leave it out"):
        compress(Delta(base, base), _DISTILLED, calibration=rows(8), device="cpu")


def test_a_model_that_is_too_large_is_told(tiny: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_COPIES", 10**9)
    with pytest.raises(CompressionError, match="more than there is. Leave it out, or take a larger device"):
        compress(tiny, _DISTILLED, calibration=rows(8), device="cpu")


def test_steps_that_are_too_few_are_told(tiny: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation._Student, "nbytes", lambda student: student.room + 1)
    with pytest.raises(CompressionError, match="after 3 trainings of 2 steps the codes still take more bytes"):
        compress(tiny, PackOptions(budget="20%", distill=2), calibration=rows(8), device="cpu")


def test_what_does_not_go_together_is_told() -> None:
    with pytest.raises(ValidationError, match="distill: trains codes of the strategy auto, found paper; leave it out"):
        PackOptions(strategy="paper", distill=5)
    with pytest.raises(ValidationError, match="would learn from the rows that a budget of kl=0.01 is measured on"):
        PackOptions(budget="kl=0.01", distill=5)
