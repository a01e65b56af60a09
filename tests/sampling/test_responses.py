from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError
from graftllm.records import Prompt, read_responses
from graftllm.rendering import render
from graftllm.sampling.pairs import preference_pairs, sft_rows
from graftllm.sampling.responses import File, Key, Source, sample_responses
from graftllm.sampling.sources import LocalSource, open_source
from graftllm.transfer_options import PairOptions, SamplingOptions, SourceOptions

OPTIONS = SamplingOptions(samples=2, temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=5)


class Stopped(Exception):
    pass


class StoppingSource:
    """A real source that is killed after some batches."""

    def __init__(self, source: Source, batches: int) -> None:
        self.source, self.batches, self.name = source, batches, source.name

    def answer(
        self, prompts: Sequence[Prompt], done: Collection[Key], options: SamplingOptions, *, seed: int, file: File
    ) -> int:
        def counting(rows: Sequence) -> None:
            self.batches -= 1
            if self.batches < 0:
                raise Stopped
            file(rows)

        return self.source.answer(prompts, done, options, seed=seed, file=counting)


@pytest.fixture(scope="module")
def source(base: Checkpoint) -> Source:
    return open_source(SourceOptions(model=str(base.path)))


def test_every_prompt_gets_its_answers(source: Source, prompts: list[Prompt], tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    sample_responses(prompts[:12], lambda: source, OPTIONS, path, source_name="base", seed=0)
    found = [(row.prompt_id, row.source, row.sample) for row in read_responses(path)]
    assert found == [(prompt.id, "base", sample) for prompt in prompts[:12] for sample in range(2)]
    assert len({row.text for row in read_responses(path)}) > 5  # drawn, not greedy


def test_tokens_of_a_local_source_are_counted(source: Source, prompts: list[Prompt], tmp_path: Path) -> None:
    assert isinstance(source, LocalSource)
    path = tmp_path / "responses.jsonl"
    options = OPTIONS.model_copy(update={"max_new_tokens": 12})
    sample_responses(prompts[:12], lambda: source, options, path, source_name="base", seed=0)
    for row, prompt in zip(read_responses(path), [prompt for prompt in prompts[:12] for _ in range(2)], strict=True):
        asked = len(render(source.tokenizer, prompt.question, answer_next=True))
        assert row.input_tokens == (asked if row.sample == 0 else 0)
        assert len(row.text) <= row.output_tokens <= 12  # a character is a token, and so is the end


def test_cut_off_answers_of_a_local_source_are_not_learnt_from(
    source: Source, prompts: list[Prompt], tmp_path: Path
) -> None:
    path, asked = tmp_path / "responses.jsonl", prompts[:12]
    options = OPTIONS.model_copy(update={"samples": 8, "max_new_tokens": 24})
    sample_responses(asked, lambda: source, options, path, source_name="base", seed=0)
    found = read_responses(path)
    cut, whole = {row.text for row in found if row.truncated}, [row for row in found if not row.truncated]
    assert cut
    assert {row.text for row in whole if row.text} - cut
    assert all(row.output_tokens == 24 for row in found if row.truncated)
    right = [replace(row, score=float(row.sample % 2)) for row in found]
    learnt = {row.answer for row in sft_rows(asked, right, PairOptions(), skill="s")}
    pairs = preference_pairs(asked, right, PairOptions()).pairs
    assert learnt
    assert not learnt & cut
    assert pairs
    assert not {text for pair in pairs for text in (pair.chosen, pair.rejected)} & cut


@pytest.mark.parametrize("cut", [0, 1, 7, 50])
def test_a_stopped_run_ends_with_the_same_rows(source: Source, prompts: list[Prompt], tmp_path: Path, cut: int) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    sample_responses(prompts[:23], lambda: source, OPTIONS, whole, source_name="base", seed=3)
    for batches in (1, 0, 2):
        with pytest.raises(Stopped):
            opening = partial(StoppingSource, source, batches)
            sample_responses(prompts[:23], opening, OPTIONS, stopped, source_name="base", seed=3)
        stopped.write_bytes(stopped.read_bytes()[: -cut or None])  # what a killed writer leaves
    sample_responses(prompts[:23], lambda: source, OPTIONS, stopped, source_name="base", seed=3)
    assert stopped.read_text() == whole.read_text()


def test_a_finished_file_asks_nothing(source: Source, prompts: list[Prompt], tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    sample_responses(prompts[:7], lambda: source, OPTIONS, path, source_name="base", seed=0)

    def never() -> Source:
        raise AssertionError("opened")

    sample_responses(prompts[:7], never, OPTIONS, path, source_name="base", seed=0)


def test_sources_share_a_file(source: Source, prompts: list[Prompt], tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    assert isinstance(source, LocalSource)
    for name in ("a", "b"):
        named = LocalSource(name, source.model, source.tokenizer)
        sample_responses(prompts[:3], lambda named=named: named, OPTIONS, path, source_name=name, seed=0)
    assert [row.source for row in read_responses(path)] == ["a"] * 6 + ["b"] * 6


def test_an_answer_ends_before_a_stop_text(source: Source, prompts: list[Prompt], tmp_path: Path) -> None:
    free, stopped = tmp_path / "free.jsonl", tmp_path / "stopped.jsonl"
    sample_responses(prompts[:5], lambda: source, OPTIONS, free, source_name="base", seed=0)
    word = next(row.text for row in read_responses(free) if len(row.text) == 4)[1:3]
    options = OPTIONS.model_copy(update={"stop": (word,)})
    sample_responses(prompts[:5], lambda: source, options, stopped, source_name="base", seed=0)
    texts = [row.text for row in read_responses(stopped)]
    assert not any(word in text for text in texts)
    assert any(
        text == row.text.split(word)[0] != row.text for text, row in zip(texts, read_responses(free), strict=True)
    )


def test_reasoning_of_a_local_source_is_stripped_unless_kept(source: Source) -> None:
    assert isinstance(source, LocalSource)
    for keep, text in (("strip", ""), ("keep", "<think>")):
        kept = LocalSource("s", source.model, source.tokenizer, keep)
        assert kept._kept("<think>") == text


def test_a_local_source_may_be_spread_over_devices(base: Checkpoint, prompts: list[Prompt], tmp_path: Path) -> None:
    spread = SourceOptions(model=str(base.path), device_map="auto")
    path = tmp_path / "responses.jsonl"
    sample_responses(prompts[:2], lambda: open_source(spread), OPTIONS, path, source_name="base", seed=0)
    assert len(read_responses(path)) == 4


def test_a_local_source_may_have_another_chat_template(base: Checkpoint, source: Source) -> None:
    other = open_source(SourceOptions(model=str(base.path), chat_template="{% for m in messages %}?{% endfor %}"))
    assert isinstance(source, LocalSource)
    assert isinstance(other, LocalSource)
    asked = [{"role": "user", "content": "ab"}]
    found = [one.tokenizer.decode(render(one.tokenizer, asked, answer_next=True)) for one in (source, other)]
    assert found == ["<user>ab<end><assistant>", "?"]


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: expected a checkpoint directory, found nothing"):
        open_source(SourceOptions(model=str(tmp_path / "none")))
