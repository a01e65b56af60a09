"""Task files and a model directory -> a score, and where the router sent the prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftllm.errors import FusionError, RecordError
from graftllm.evaluation.scores import Evaluation, evaluate
from graftllm.fusion.beside import mixed
from graftllm.fusion.grafted import GraftedModel, Wanted
from graftllm.fusion.manifest import AUTO, MANIFEST
from graftllm.fusion.routes import BASE
from graftllm.generation import GREEDY, generate
from graftllm.loading import load_model, load_tokenizer
from graftllm.recipe import SamplingOptions
from graftllm.records import Prompt, read_prompts
from graftllm.rendering import context_length, render
from graftllm.sampling.scoring import check_judgeable
from graftllm.transfer_options import judge_named

BY_TASK = "by-task"


@dataclass(frozen=True)
class TaskResult:
    """Scores of task files, and how many prompts each pack (or `base`) of a grafted model answered."""

    evaluation: Evaluation
    routes: Mapping[str, int]

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm eval --json` prints."""
        scores = {
            task: {"score": score.value, "n": score.n, "stderr": score.stderr}
            for task, score in self.evaluation.by_task.items()
        }
        overall = self.evaluation.overall
        return {
            "score": overall.value,
            "n": overall.n,
            "stderr": overall.stderr,
            "by_task": scores,
            "routes": dict(self.routes),
        }

    def sentences(self) -> list[str]:
        """Return the scores and routes, a line each."""
        lines = {"all": self.evaluation.overall, **self.evaluation.by_task}
        width = max(map(len, lines))
        told = [
            f"{task:<{width}}  {score.value:.3f} ± {score.stderr:.3f}  (n = {score.n})" for task, score in lines.items()
        ]
        if self.routes:
            told.append("answered by " + ", ".join(f"{name} {count}" for name, count in self.routes.items()))
        return told


def check_unpacked(directory: Path, pack: str) -> None:
    """Refuse a pack's name where an ordinary checkpoint is asked, or nothing is there.

    Raises:
        FusionError: it is neither `base` nor one of the words that stand for no single pack.
    """
    if pack in (AUTO, BASE, BY_TASK):
        return
    if not directory.is_dir():
        raise FusionError(
            f"--pack {pack}: expected a grafted model at {directory}, found no directory there; check the path."
        )
    raise FusionError(
        f"--pack {pack}: {directory} is an ordinary checkpoint, which has no packs; leave it out, or give a "
        "grafted model (`graftllm fuse`)."
    )


def read_tasks(files: Sequence[Path]) -> list[Prompt]:
    """Return the rows of all files.

    Raises:
        FusionError: one is given twice, so that its rows would count twice.
        RecordError: as for `read_prompts`.
    """
    given = [file.resolve() for file in files]
    for i, file in enumerate(files):
        if given.index(given[i]) < i:
            raise FusionError(f"--task {file}: is given twice, so its rows would count twice; give it once.")
    return [row for file in files for row in read_prompts(file)]


def evaluate_tasks(
    directory: Path,
    tasks: Sequence[Path],
    *,
    pack: str = AUTO,
    judge: str = "exact",
    options: SamplingOptions = GREEDY,
    device: str = "auto",
) -> TaskResult:
    """Score a grafted model or an ordinary checkpoint on files of prompts with references.

    Args:
        directory: a grafted model, or a checkpoint (which answers as `base`).
        tasks: JSONL of prompt rows.
        pack: a pack's name, `base`, `auto` (the router), or `by-task` (each row's `task` names the pack, else `base`).
        judge: how answers are compared with references.
        options: decoding.
        device: `auto` takes a GPU when there is one.

    Raises:
        GraftError: the directory, the file or the pack's name cannot be used.
        RecordError: a prompt leaves no room for an answer in what the model reads.
        SamplingError: a prompt lacks what the judge compares with.
    """
    prompts = read_tasks(tasks)
    check_judgeable(prompts, judge_named(judge))
    if not (directory / MANIFEST).exists():
        check_unpacked(directory, pack)
        model, tokenizer = load_model(directory, device=device), load_tokenizer(directory)
        _check_lengths(model, prompts, [tokenizer] * len(prompts))

        def plain(rows: Sequence[Prompt]) -> list[str]:
            return [texts[0] for texts in generate(model, tokenizer, [row.question for row in rows], options)]

        return TaskResult(evaluate(plain, prompts, judge), {})
    grafted = GraftedModel.load(directory, device=device)
    wanted: Sequence[Wanted] = [pack] * len(prompts)
    names = [pack] * len(prompts)
    if pack == AUTO:
        routes = grafted.route([row.question for row in prompts])
        wanted, names = [route.weights for route in routes], [route.name for route in routes]
    elif pack == BY_TASK:
        wanted = names = [row.task if row.task in grafted.packs else BASE for row in prompts]
    mixes = [dict(mixed(one, grafted.packs, also=(BASE, AUTO))) for one in wanted]
    _check_lengths(grafted.model, prompts, [grafted.voices.of(mix).tokenizer for mix in mixes])

    def routed(rows: Sequence[Prompt]) -> list[str]:
        return grafted.generate([row.question for row in rows], wanted, options)

    return TaskResult(evaluate(routed, prompts, judge), dict(Counter(names)))


def _check_lengths(
    model: PreTrainedModel, prompts: Sequence[Prompt], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> None:
    """Refuse a prompt that leaves no room for an answer; each is read by a tokenizer of its own."""
    most = context_length(model)
    if most is None:
        return
    for prompt, tokenizer in zip(prompts, tokenizers, strict=True):
        if (tokens := len(render(tokenizer, prompt.question, answer_next=True))) >= most:
            raise RecordError(
                f"task row {prompt.id!r}: expected at most {most} tokens of prompt and answer together, as many as the "
                f"model reads, found {tokens} in the prompt. Shorten it or leave it out."
            )
