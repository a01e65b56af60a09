from pathlib import Path

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.fusion.directory import add_packs, remove_pack, write_grafted
from graftllm.fusion.fitting import features_of, fit_router
from graftllm.fusion.grafted import GraftedModel
from graftllm.loading import load_model, load_tokenizer
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import RouterOptions, SamplingOptions
from graftllm.records import Message, Prompt
from tests.models import perturb, rows

SHORT = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=6)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_pack_that_came_and_went_leaves_every_file_and_answer_as_it_was(
    base_dir: Path, delta: Delta, tmp_path: Path
) -> None:
    other = Delta(delta.base, Checkpoint.open(perturb(base_dir, tmp_path / "other", seed=6)))
    for name, change in (("old", delta), ("new", other)):
        compress(change, PackOptions(strategy="exact")).save(tmp_path / f"{name}.safetensors")
    texts = {"old": [f"{i * 7919} {i}" for i in range(40)], "new": [f"?!{'!' * (i % 20)}{i}" for i in range(40)]}
    asked = {
        name: [Prompt(f"{name}{i}", (Message(role="user", content=text),)) for i, text in enumerate(some)]
        for name, some in texts.items()
    }
    general = rows(40, answered=False)
    router = fit_router(base_dir, {"base": general, "old": asked["old"]}, RouterOptions(steps=60, drift=0.2))
    write_grafted(tmp_path / "g", str(base_dir), {"old": tmp_path / "old.safetensors"}, router)
    questions = [row.question for row in (*general[:3], *asked["old"][:3])]
    before, answers = _files(tmp_path / "g"), GraftedModel.load(tmp_path / "g").generate(questions, "auto", SHORT)
    model, words = load_model(base_dir), load_tokenizer(base_dir)
    grown = router.with_pack("new", features_of(model, words, asked["new"], router.options))
    add_packs(tmp_path / "g", {"new": tmp_path / "new.safetensors"}, router=grown)
    assert GraftedModel.load(tmp_path / "g").route([asked["new"][0].question])[0].name == "new"
    remove_pack(tmp_path / "g", "new")
    assert _files(tmp_path / "g") == before
    assert GraftedModel.load(tmp_path / "g").generate(questions, "auto", SHORT) == answers
