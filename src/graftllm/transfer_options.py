"""What a recipe says of prompts, sources, judges and pairs; the sections of its first half.

A string stands for the section with one value: `prompts: a.jsonl` for `prompts: {files: [a.jsonl]}`,
`sources: [org/name]` for `sources: [{model: org/name}]`, `judge: math` for `judge: [{kind: math}]`.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, field_validator, model_validator


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingOptions(Section):
    """How a source is asked."""

    samples: int = Field(default=4, ge=1, description="answers per prompt")
    temperature: float = Field(default=0.8, ge=0, description="0 is greedy")
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=64, ge=1, description="prompts per batch")
    repetition_penalty: float = Field(default=1.0, gt=0, description="1 is none")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer; they are not part of it")

    @model_validator(mode="after")
    def _answers_can_differ(self) -> "SamplingOptions":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("samples: at temperature 0 every answer is the same; ask for 1 or raise the temperature")
        return self


class PromptSet(Section):
    """Prompt rows from files or from a data set of the Hub."""

    files: tuple[str, ...] = Field(default=(), description="JSONL or Parquet")
    dataset: str | None = Field(default=None, description="Hub id, or a directory that `datasets` can load")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = Field(
        default={}, description="our key (id, prompt, messages, task, reference, tests, metadata) to the set's column"
    )
    limit: int | None = Field(default=None, ge=1, description="the first rows only")

    @model_validator(mode="after")
    def _one_origin(self) -> "PromptSet":
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("expected either files or a dataset")
        if unknown := set(self.columns) - {"id", "prompt", "messages", "task", "reference", "tests", "metadata"}:
            raise ValueError(f"columns: {sorted(unknown)[0]!r} is no key of a prompt row")
        return self


class Price(Section):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)


class Endpoint(Section):
    """A model behind an OpenAI-compatible URL, and how patiently it is asked."""

    model: str = Field(description="the name that the endpoint knows it by")
    url: str | None = Field(default=None, description="such as http://localhost:8000/v1")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the key")
    concurrency: int = Field(default=16, ge=1, description="requests under way at once")
    timeout_s: float = Field(default=600, gt=0, description="for one whole reply")
    retries: int = Field(default=8, ge=0, description="of one request, after 408, 409, 429, 5xx, timeouts, bad replies")
    max_failures: int = Field(default=0, ge=0, description="requests that may fail for good before the run stops")
    samples_per_request: int = Field(default=1, ge=1, description="`n`; above 1 the server shares one seed among them")
    reasoning: Literal["strip", "keep"] = Field(default="strip", description="what becomes of reasoning traces")
    price: Price | None = None

    @field_validator("url")
    @classmethod
    def _no_secret_in_url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^/]", url):
            raise ValueError("expected http:// or https://")
        if url is not None and ("@" in url or "?" in url):
            raise ValueError("expected no user, password or query; put the key into an environment variable")
        return url


class SourceOptions(Endpoint):
    """A model that has the skill: a checkpoint on this machine, or with `url` one behind an endpoint."""

    model: str = Field(description="checkpoint directory or Hub id; with a URL, the name that the endpoint knows")
    name: str = Field(
        default="",
        pattern=r"^[^./\x00-\x1f][^/\x00-\x1f]{0,99}$",
        description="what its responses are filed under; the last part of `model`",
    )
    sampling: SamplingOptions | None = Field(default=None, description="instead of the recipe's")
    device_map: str | None = Field(default=None, description="`auto` spreads a local model over several devices")
    chat_template: str | None = Field(
        default=None, min_length=1, description="Jinja file or text, instead of what a local model's tokenizer has"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("model"), str) and not given.get("name"):
            return given | {"name": given["model"].rstrip("/").split("/")[-1]}
        return given

    @model_validator(mode="after")
    def _template_is_used(self) -> "SourceOptions":
        if self.url is not None and self.chat_template is not None:
            raise ValueError("chat_template: a model behind a URL has its server's own; leave it out, or the url")
        return self


def is_template(text: str) -> bool:
    """Say whether a chat template is given as such, and not as the path of one.

    >>> is_template("{% for m in messages %}{{ m.content }}{% endfor %}"), is_template("{dir}/chat.jinja")
    (True, False)
    """
    return "{{" in text or "{%" in text


class RuleJudge(Section):
    """Right or wrong, by a rule that compares with the reference."""

    kind: Literal["exact", "math", "choice", "reasoning_gym"]


class CodeJudge(Section):
    """Right when the prompt's unit tests pass in a sandbox."""

    kind: Literal["code"]
    timeout_s: float = Field(default=10, gt=0, description="wall clock and CPU seconds of one answer")
    memory_mb: int = Field(default=1024, ge=64, description="address space of a process")
    processes: int = Field(default=8, ge=1)
    disk_mb: int = Field(default=16, ge=1)
    workers: int = Field(default=4, ge=1, description="answers tested at once")
    allow_unsandboxed: bool = Field(default=False, description="run answers also where nothing can isolate them")


class RewardJudge(Section):
    """A grade by a sequence-classification model with one output."""

    kind: Literal["reward_model"]
    model: str = Field(description="checkpoint directory or Hub id")
    batch_size: int = Field(default=8, ge=1)
    max_length: int = Field(default=4096, ge=2, description="tokens; longer conversations are cut on the left")


class LlmJudge(Endpoint):
    """A grade between 0 and 1 by a model behind a URL that follows a rubric."""

    kind: Literal["judge"]
    rubric: str = Field(min_length=1, description="what a good answer is")
    best_grade: int = Field(default=10, ge=1, description="the highest grade; the lowest is 0")
    max_new_tokens: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _has_url(self) -> "LlmJudge":
        if self.url is None:
            raise ValueError("url: expected the endpoint of the judge, such as http://localhost:8000/v1")
        return self


JudgeOptions = Annotated[RuleJudge | CodeJudge | RewardJudge | LlmJudge, Field(discriminator="kind")]
RULES = (RuleJudge, CodeJudge)  # judges that say right or wrong; the others grade


class ContaminationOptions(Section):
    """How prompts are compared with what the run is tested on."""

    ngram: int = Field(default=13, ge=1, description="words in a row that may not be shared with a test prompt")
    action: Literal["warn", "drop", "error"] = "warn"
    against: Annotated[tuple[PromptSet, ...], BeforeValidator(lambda given: _listed(given, _prompt_set))] = Field(
        default=(), description="evaluation sets besides the recipe's own tests"
    )


class PairOptions(Section):
    """Which responses become rows to learn from."""

    sft: Literal["best", "each"] = Field(default="best", description="one row a prompt, or one a prompt and source")
    preference: Literal["same_source", "any_source", "on_policy"] = Field(
        default="same_source", description="whose best and worst make a pair; on_policy: the model's own after SFT"
    )
    min_gap: float = Field(default=0.0, ge=0, description="between the grades of a pair, or scores without grades")
    max_gap: float | None = Field(default=None, gt=0)
    sft_share: float | None = Field(
        default=None, gt=0, le=1, description="share of the prompts for SFT, the rest for pairs; all for both if null"
    )
    min_grade: float | None = Field(default=None, description="answers below are not learnt from")
    max_chars: int | None = Field(default=None, ge=1, description="longer answers are left out")
    refusals: Literal["drop", "keep"] = "drop"


def _listed(given: Any, one: Callable[[Any], Any]) -> Any:
    """Return what stands for several, as a list; `one` reads each."""
    return [one(entry) for entry in (given if isinstance(given, list | tuple) else [given])]


def _prompt_set(given: Any) -> Any:
    return {"files": [given]} if isinstance(given, str) else given


def _source(given: Any) -> Any:
    return {"model": given} if isinstance(given, str) else given


def _judge(given: Any) -> Any:
    return {"kind": given} if isinstance(given, str) else given


def judge_named(judge: "str | JudgeOptions") -> "JudgeOptions":
    """Return the judge of a kind with every default, or the judge that is given.

    Raises:
        ValidationError: a kind that is not known, or that needs more than its name.
    """
    return TypeAdapter(JudgeOptions).validate_python({"kind": judge}) if isinstance(judge, str) else judge


PromptSets = Annotated[
    tuple[PromptSet, ...], BeforeValidator(lambda given: _listed(given, _prompt_set)), Field(min_length=1)
]
Sources = Annotated[
    tuple[SourceOptions, ...], BeforeValidator(lambda given: _listed(given, _source)), Field(min_length=1)
]
OneJudge = Annotated[JudgeOptions, BeforeValidator(_judge)]
Judges = Annotated[tuple[JudgeOptions, ...], BeforeValidator(lambda given: _listed(given, _judge)), Field(min_length=1)]


class Skill(Section):
    """One capability to move: who has it, what to ask, how to judge and test it."""

    sources: Sources
    prompts: PromptSets
    test: PromptSets
    judge: Judges = (RuleJudge(kind="exact"),)
    test_judge: OneJudge | None = Field(default=None, description="of the test prompts; the first of `judge`")
    pairs: PairOptions | None = Field(default=None, description="instead of the recipe's")
    description: str = ""
    added_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="tokens that the fine-tune gets if the target's tokenizer lacks them"
    )

    @model_validator(mode="after")
    def _judges_fit(self) -> "Skill":
        grading = [judge.kind for judge in self.judge if not isinstance(judge, RULES)]
        if len(grading) > 1:
            raise ValueError(
                f"judge: expected at most one that grades (reward_model or judge), found {' and '.join(grading)}"
            )
        if isinstance(self.tested_by, RewardJudge):
            raise ValueError("test_judge: a reward model cannot tell right from wrong; name another judge for the test")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise ValueError("sources: two have the same name; give each its own `name`")
        return self

    @property
    def tested_by(self) -> JudgeOptions:
        """What judges the test prompts."""
        return self.test_judge or self.judge[0]


class General(Section):
    """What the target can do already and must not lose."""

    prompts: PromptSets
    test: PromptSets
    judge: OneJudge = RuleJudge(kind="exact")

    @model_validator(mode="after")
    def _judge_tells_right_from_wrong(self) -> "General":
        if isinstance(self.judge, RewardJudge):
            raise ValueError("judge: a reward model cannot tell right from wrong; name another judge")
        return self
