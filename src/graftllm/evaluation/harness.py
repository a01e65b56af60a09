"""lm-evaluation-harness on a grafted model or a checkpoint: its tasks, its prompts and its metrics, our packs.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) is an extra and is imported when it is asked for.
Its own wrapper of transformers models does the scoring; here it is only told which weights to do it with.
"""

import difflib
import importlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftllm.errors import FusionError, RecordError
from graftllm.evaluation.tasks import BY_TASK, check_unpacked
from graftllm.fusion.beside import mixed
from graftllm.fusion.grafted import Conversation, GraftedModel
from graftllm.fusion.manifest import AUTO, MANIFEST
from graftllm.fusion.routes import BASE
from graftllm.loading import load_model, load_tokenizer
from graftllm.records import Message

_BATCH = 16
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found.

    Attributes:
        scores: by task and metric (with the filter's name where that is not `none`), each with its standard error.
        counts: how many documents of each task were scored.
        routes: how many of the harness' requests each pack (or `base`) answered; one a choice where there are choices.
    """

    scores: Mapping[str, Mapping[str, tuple[float, float | None]]]
    counts: Mapping[str, int]
    routes: Mapping[str, int]

    def figures(self) -> dict[str, Any]:
        """Return what `graftllm eval --lm-eval --json` prints."""
        tasks = {
            task: {"n": self.counts.get(task)}
            | {metric: {"score": value, "stderr": error} for metric, (value, error) in metrics.items()}
            for task, metrics in self.scores.items()
        }
        return {"tasks": tasks, "routes": dict(self.routes)}

    def sentences(self) -> list[str]:
        """Return the scores and routes, a line each."""
        lines = [
            f"{task}  {metric}  {value:.4f}{'' if error is None else f' ± {error:.4f}'}  (n = {self.counts.get(task)})"
            for task, metrics in self.scores.items()
            for metric, (value, error) in metrics.items()
        ]
        if self.routes:
            lines.append("requests answered by " + ", ".join(f"{name} {count}" for name, count in self.routes.items()))
        return lines


def evaluate_harness(
    directory: Path, tasks: Sequence[str], *, pack: str = AUTO, chat_template: bool = False, device: str = "auto"
) -> HarnessResult:
    """Run tasks of the harness.

    Args:
        directory: a grafted model, or a checkpoint (which answers as `base`).
        tasks: names that the harness knows, or YAML files of tasks of your own.
        pack: a pack's name, `base`, or `auto`, where the router chooses for each request by its text.
        chat_template: put each request into the tokenizer's chat template, as a user's message.
        device: `auto` takes a GPU when there is one.

    Raises:
        FusionError: the harness is not installed, or the pack is not there.
        RecordError: there is no such task, or its data cannot be had.
        CheckpointError: the model cannot be loaded.
    """
    try:
        harness = importlib.import_module("lm_eval")
        wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
        task_manager: Any = importlib.import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise FusionError(
            f"--lm-eval: needs lm-evaluation-harness, which is not here ({error}); pip install 'graftllm[eval]'."
        ) from error
    if pack == BY_TASK:
        raise FusionError("--pack: by-task is for --task; with --lm-eval name a pack, base or auto.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is not given by name
    names, manager = _known_tasks(tasks, task_manager)
    answering = _answering(directory, pack, device)
    model = _wrapped(wrapper, answering)
    try:
        found = harness.simple_evaluate(
            model, tasks=names, task_manager=manager, apply_chat_template=chat_template, log_samples=False
        )
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RecordError(
            f"--lm-eval: the data of {', '.join(names)} cannot be had ({reason[0]}). Check its name and the network."
        ) from error
    return HarnessResult(
        {task: _metrics(values) for task, values in found["results"].items()},
        {task: count["effective"] for task, count in found.get("n-samples", {}).items()},
        dict(answering.routes),
    )


@dataclass
class _Answering:
    """A model, which of its packs answers what, and the tokens that end the answers now; none for the model's own."""

    model: Any
    tokenizer: Any
    grafted: GraftedModel | None
    pack: str
    routes: Counter[str] = field(default_factory=Counter)
    ends: tuple[int, ...] = ()

    def __call__(self, conversations: Sequence[Conversation], answer: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Return an answer for each conversation; `answer` is asked for those of one mix of packs at a time."""
        mixes: list[dict[str, float]] = [{}] * len(conversations)
        names = [BASE] * len(conversations)
        if self.grafted is not None and self.pack == AUTO:
            routes = self.grafted.route(conversations)
            mixes, names = [dict(route.weights) for route in routes], [route.name for route in routes]
        elif self.grafted is not None and self.pack != BASE:
            mixes, names = [{self.pack: 1.0}] * len(conversations), [self.pack] * len(conversations)
        if self.grafted is not None:
            self.routes.update(names)
        answers: list[Any] = [None] * len(conversations)
        for mix in [dict(one) for one in dict.fromkeys(tuple(sorted(mix.items())) for mix in mixes)]:
            mine = [i for i, one in enumerate(mixes) if one == mix]
            if self.grafted is None:
                found = answer(mine)
            else:
                self.ends = self.grafted.voices.of(mix).ends
                with self.grafted.using(mix):
                    found = answer(mine)
            for i, one in zip(mine, found, strict=True):
                answers[i] = one
        return answers


def _answering(directory: Path, pack: str, device: str) -> _Answering:
    if not (directory / MANIFEST).exists():
        check_unpacked(directory, pack)
        return _Answering(load_model(directory, device=device), load_tokenizer(directory), None, BASE)
    grafted = GraftedModel.load(directory, device=device)
    if pack != AUTO:
        mixed(pack, grafted.packs, also=(BASE, AUTO))  # refuses an unknown one before anything is downloaded
    elif own := [name for name in grafted.packs if grafted.voices[name].tokenizer is not grafted.tokenizer]:
        raise FusionError(
            f"--lm-eval: {own[0]!r} has a tokenizer or chat template of its own, and the harness knows one for all "
            "requests; name a pack (--pack) instead of auto."
        )
    return _Answering(grafted.model, grafted.voices[pack].tokenizer, grafted, pack)


def _wrapped(wrapper: Any, answering: _Answering) -> Any:
    """Return the harness' model, whose requests go where `answering` sends them."""
    told: dict[str, list[Message]] = {}  # conversations by what the chat template made of them

    class Grafted(wrapper):
        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            text = super().apply_chat_template(chat_history, add_generation_prompt)
            told[text] = [Message(role=one["role"], content=one["content"]) for one in chat_history]
            return text

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self.sent(requests, super().loglikelihood, disable_tqdm)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self.sent(requests, super().loglikelihood_rolling, disable_tqdm)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self.sent(requests, super().generate_until, disable_tqdm)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            ends = {"eos_token_id": list(answering.ends)} if answering.ends else {}
            return super()._model_generate(context, max_length, stop, **(ends | options))

        def sent(self, requests: list[Any], answer: Callable[..., list[Any]], disable_tqdm: bool) -> list[Any]:
            """Send requests by their contexts; the router reads a conversation as it was before the template."""
            conversations: list[Conversation] = [told.get(one.args[0]) or str(one.args[0]) for one in requests]
            quiet = disable_tqdm or bool(os.environ.get("TQDM_DISABLE"))  # which the harness does not ask for
            return answering(conversations, lambda some: answer([requests[i] for i in some], quiet))

    return Grafted(pretrained=answering.model, tokenizer=answering.tokenizer, batch_size=_BATCH)


def _known_tasks(tasks: Sequence[str], task_manager: Any) -> tuple[list[str], Any]:
    """Return the harness' names of tasks, and what finds them."""
    files = {one: Path(one) for one in tasks if Path(one).suffix in _YAML}
    names = [_named(files[one]) if one in files else one for one in tasks]
    places = [str(path.parent) for path in files.values()]
    manager = task_manager(include_path=places or None, include_defaults=len(files) < len(names))
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ". Name one of its tasks, or a YAML file."
            raise RecordError(f"--lm-eval: lm-evaluation-harness knows no task {name!r}{hint}")
    return names, manager


def _named(file: Path) -> str:
    try:
        found = re.search(r"^(?:task|group):\s*['\"]?([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read ({error}); expected a task's YAML file there.") from error
    if found is None:
        raise RecordError(f"{file}: expected a line such as `task: my_task`, found none.")
    return found[1]


def _metrics(values: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the scores among a task's results, each with its standard error where there is one."""
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        found[label] = float(value), float(error) if isinstance(error, int | float) else None
    return found
