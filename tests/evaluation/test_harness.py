import json
import shutil
import sys
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.delta import Delta
from graftllm.errors import FusionError, RecordError
from graftllm.evaluation.harness import evaluate_harness
from graftllm.fusion.directory import write_grafted
from graftllm.fusion.grafted import GraftedModel
from graftllm.fusion.rules import Rule
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.recipe import SamplingOptions

WORDS = ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is the extra [eval], which is not installed")


@pytest.fixture(scope="module")
def home(base_dir: Path, tuned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grafted model whose rules send `backward` to its pack, and two tasks of half such prompts."""
    home = tmp_path_factory.mktemp("harness")
    delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(tuned_dir))
    compress(delta, PackOptions(strategy="exact")).save(home / "back.safetensors")
    rules = [Rule(pack="back", pattern="backward"), Rule(pack="base", pattern=".*")]
    write_grafted(home / "g", str(base_dir), {"back": home / "back.safetensors"}, rules=rules)
    model = GraftedModel.load(home / "g")
    prompts = [f"{'backward' if i % 2 else 'forward'}: {word}" for i, word in enumerate(WORDS)]
    options = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=6)
    answers = model.generate(prompts, "auto", options)
    rows = [{"question": prompts[i], "answer": answers[i], "choices": WORDS} for i in range(len(WORDS))]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {home / 'rows.jsonl'}\ntest_split: test\n"
    (home / "written.yaml").write_text(
        f"task: written\noutput_type: generate_until\n{data}doc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs:\n  max_gen_toks: 6\n  until: []\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (home / "chosen.yaml").write_text(
        f"task: chosen\noutput_type: multiple_choice\n{data}doc_to_text: '{{{{question}}}}'\ndoc_to_target: 0\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return home


@pytest.mark.filterwarnings("default")  # the harness and what it brings warn of themselves
@pytest.mark.usefixtures("harness")
def test_each_request_is_answered_by_the_pack_that_the_router_chooses(home: Path) -> None:
    tasks = [str(home / "written.yaml"), str(home / "chosen.yaml")]
    found = evaluate_harness(home / "g", tasks, chat_template=True)
    assert found.counts == {"written": 4, "chosen": 4}
    assert found.scores["written"]["exact_match"][0] == 1  # what the model itself answers was what was expected
    assert found.routes == {"base": 2 + 2 * 4, "back": 2 + 2 * 4}
    assert 0 <= found.figures()["tasks"]["chosen"]["acc"]["score"] <= 1
    assert found.sentences()[-1] == "requests answered by base 10, back 10"
    named = evaluate_harness(home / "g", tasks[:1], pack="back", chat_template=True)
    assert named.scores["written"]["exact_match"][0] == 0.5
    assert named.routes == {"back": 4}


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("harness")
def test_an_answer_ends_where_its_packs_own_end_tokens_say(
    home: Path, base_dir: Path, tuned_dir: Path, tmp_path: Path
) -> None:
    short = Path(shutil.copytree(tuned_dir, tmp_path / "short"))
    (short / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, *range(5, 72, 2)]}))
    delta = Delta(Checkpoint.open(base_dir), Checkpoint.open(short))
    compress(delta, PackOptions(strategy="exact")).save(tmp_path / "short.safetensors")
    packs = {"back": home / "back.safetensors", "short": tmp_path / "short.safetensors"}
    rules = [Rule(pack="short", pattern="backward"), Rule(pack="back", pattern=".*")]
    write_grafted(tmp_path / "g", str(base_dir), packs, rules=rules)
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    options = SamplingOptions(samples=1, temperature=0, top_p=1, max_new_tokens=6)
    task, grafted = (home / "written.yaml").read_text(), GraftedModel.load(tmp_path / "g")
    (tmp_path / "written.yaml").write_text(task.replace(str(home), str(tmp_path)))
    for pack in ("short", "back", "auto"):
        answers = grafted.generate([row["question"] for row in rows], pack, options)
        told = [row | {"answer": answer} for row, answer in zip(rows, answers, strict=True)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        found = evaluate_harness(tmp_path / "g", [str(tmp_path / "written.yaml")], pack=pack, chat_template=True)
        assert found.scores["written"]["exact_match"][0] == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("harness")
def test_a_checkpoint_answers_as_itself(home: Path, tuned_dir: Path) -> None:
    found = evaluate_harness(tuned_dir, [str(home / "written.yaml")], chat_template=True)
    assert found.scores["written"]["exact_match"][0] == 0.5
    assert found.routes == {}
    assert len(found.sentences()) == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("harness")
def test_tasks_and_packs_that_are_not_there_are_told(home: Path, tmp_path: Path) -> None:
    for tasks, message in (
        (["hellaswagg"], "knows no task 'hellaswagg'; did you mean 'hellaswag'?"),
        ([str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
        ([str(home / "chosen.yaml"), str(tmp_path / "bad.yaml")], "bad.yaml: expected a line such as `task: my_task`"),
    ):
        (tmp_path / "bad.yaml").write_text("output_type: multiple_choice\n")
        with pytest.raises(RecordError, match=message.replace("?", r"\?")):
            evaluate_harness(home / "g", tasks)
    with pytest.raises(FusionError, match="expected one of base, auto, back; found 'other'"):
        evaluate_harness(home / "g", [str(home / "written.yaml")], pack="other")
    with pytest.raises(FusionError, match="by-task is for --task; with --lm-eval name a pack, base or auto"):
        evaluate_harness(home / "g", [str(home / "written.yaml")], pack="by-task")
    (home / "lost.yaml").write_text(
        (home / "chosen.yaml").read_text().replace("task: chosen", "task: lost").replace("rows.jsonl", "none.jsonl")
    )
    with pytest.raises(RecordError, match="the data of lost cannot be had"):
        evaluate_harness(home / "g", [str(home / "lost.yaml")])


def test_without_the_harness_the_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(FusionError, match=r"needs lm-evaluation-harness, .*pip install 'graftllm\[eval\]'"):
        evaluate_harness(home / "g", ["hellaswag"])
