from pathlib import Path

import pytest
import torch
from dpo import margins
from dpo_report import Found, gains
from dpo_report import draw as draw_stages
from dpo_report import table as stage_table
from transfer_models import answered, first_answers
from transfer_report import cost_table, costs, draw, mean_score, table
from transfer_rows import LORAS, PACKS, Row, lora_rank

from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message, PreferencePair, Prompt, Response
from graftllm.rendering import render_answered
from graftllm.stages import Stamp
from tests.models import save_llama


def row(sort: float, size: int | None = 1000, **general: float) -> Row:
    return Row({"sort": sort, "next": 0.5, **general}, size)


def stamp(name: str, cpu: float, memory: int = 0) -> Stamp:
    return Stamp(name, "key", None, 2 * cpu, memory, cpu_seconds=cpu)


def test_a_table_has_means_and_standard_errors_over_the_seeds_that_have_a_row() -> None:
    results = {0: {"base": row(0.0, None, general=0.9), "LoRA": row(0.3)}, 1: {"base": row(0.1, None, general=0.7)}}
    lines = table(results).splitlines()
    assert lines[2] == "| base | 27.5 ± 2.5 | 5.0 ± 5.0 | 50.0 ± 0.0 | 80.0 ± 10.0 |  | 2 |  |"
    assert lines[3] == "| LoRA | 40.0 | 30.0 | 50.0 |  | 1,000 | 1 |  |"


def test_the_general_tasks_are_no_skill() -> None:
    assert mean_score(row(0.3, general=0.0)) == pytest.approx(0.4)


def test_costs_add_up_by_kind_of_stage_and_leave_out_what_is_no_work() -> None:
    stamps = [stamp("sft.sort", 2, 5), stamp("sft.next", 3, 4), stamp("sft.lora8.sort", 7), stamp("evaluate.base", 9)]
    spent = costs(stamps)
    assert set(spent) == {"sft", "sft lora8"}
    assert (spent["sft"].cpu_seconds, spent["sft"].seconds, spent["sft"].peak_memory_bytes) == (5, 10, 5)


def test_what_packing_takes_is_a_share_of_training() -> None:
    spent = {0: costs([stamp("sft.sort", 6), stamp("dpo.sort", 2), stamp("pack-auto.sort", 2)])}
    lines = cost_table(spent, {0: {"sft": 1234}}).splitlines()
    assert lines[2] == "| sft | 6.0 | 12.0 | 1,234 | 0 | 75.0 % |"
    assert lines[4] == "| pack-auto | 2.0 | 4.0 |  | 0 | 25.0 % |"


def test_ranks_are_those_of_as_many_bytes_as_packs_may_have() -> None:
    budgets = {wanted["budget"] for wanted in PACKS.values() if "distill" not in wanted}
    assert {share for share in LORAS.values() if share} == budgets
    assert lora_rank("near 5%", 2_000_000, 30_000) == 3


def test_pictures_are_drawn(tmp_path: Path) -> None:
    results = {
        seed: {"base": row(0.1, None), "SkillPack, auto": row(0.9), "one": row(0.8, general=1.0)} for seed in (0, 1)
    }
    draw(results, tmp_path / "bytes.png")
    stages = {seed: {"careless: SFT": Found(0.3), "careless: DPO": Found(0.5, 9, 0.1, -2.0, 1.0)} for seed in (0, 1)}
    draw_stages(stages, tmp_path / "stages.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("bytes.png", "stages.png"))


def test_gains_are_over_the_same_seeds_own_sft() -> None:
    results = {
        0: {"careless: SFT": Found(0.3), "careless: DPO": Found(0.5, 9, 0.1, -2.0, 1.0)},
        1: {"careless: SFT": Found(0.5), "careless: DPO": Found(0.6, 11, 0.3, -3.0, 0.5)},
    }
    assert gains(results, "careless: DPO") == pytest.approx([0.2, 0.1])
    lines = stage_table(results).splitlines()
    assert lines[2] == "| careless: SFT | 40.0 ± 10.0 |  |  |  |  |  | 2 |"
    expected = "| careless: DPO | 55.0 ± 5.0 | 15.0 ± 5.0 | 10 | +0.20 ± 0.10 | -2.50 ± 0.50 | 75.0 ± 25.0 | 2 |"
    assert lines[3] == expected


def test_unverified_rows_are_each_prompts_first_answer_right_or_wrong() -> None:
    prompts = [Prompt(name, (Message(role="user", content=name),), "say", name) for name in ("a", "b", "c")]
    told = [("a", 0, "x"), ("a", 1, "a"), ("b", 0, " "), ("c", 0, "c"), ("other", 0, "o")]
    rows = first_answers(prompts, [Response(name, "source", sample, text, 0.0) for name, sample, text in told])
    assert [(row.id, row.question, row.answer) for row in rows] == [
        ("a", prompts[0].messages, "x"),
        ("c", prompts[2].messages, "c"),
    ]


def test_margins_are_log_ratios_of_whole_answers(tmp_path: Path) -> None:
    before, after = save_llama(tmp_path / "before", seed=0), save_llama(tmp_path / "after", seed=1)
    pairs = [PreferencePair("1", (Message(role="user", content="say ab"),), "ab", "wrong")]

    def log_p(model: Path, text: str) -> float:
        words, live = load_tokenizer(model), load_model(model, device="cpu")
        ids, start = render_answered(words, answered(Prompt("1", pairs[0].messages), text))
        with torch.inference_mode():
            found = live(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        return found.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()

    moved = margins(before, after, pairs)
    chosen, rejected = (log_p(after, text) - log_p(before, text) for text in ("ab", "wrong"))
    assert moved["chosen"] == pytest.approx(chosen, rel=1e-4)
    assert moved["rejected"] == pytest.approx(rejected, rel=1e-4)
    assert moved["preferred"] == (chosen > rejected)
    assert margins(before, before, pairs) == {"chosen": 0.0, "rejected": 0.0, "preferred": 0.0}
