"""What a recipe asks for, stage by stage: rows, tokens, operations. No hardware in it.

With N parameters a token takes 2 N operations forward and 4 N backward (arXiv 2001.08361); what attention adds with
the square of the length is left out, and embeddings count as if they were multiplied. Every prompt counts as if it
gave a row to learn from, and every group of answers a pair: the real numbers are smaller.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from graftllm.costs.models import Sized
from graftllm.costs.prompts import Assumed, Prompts
from graftllm.recipe import Recipe
from graftllm.sampling.scoring import dollars
from graftllm.training_options import TrainingOptions
from graftllm.transfer_options import JudgeOptions, LlmJudge, RewardJudge, SamplingOptions, SourceOptions

GENERAL = "general"
_RUBRIC = 200  # tokens around what a judge with a rubric reads
_CALIBRATION = 128  # rows that a pack is calibrated on
_READINGS = 3  # of the tuned model on them: moments, then forward and backward counted as two more

Way = Literal["endpoint", "generate", "read", "train", "pack"]


@dataclass(frozen=True)
class Amount:
    """A part of a run.

    Attributes:
        stage: `sample`, `judge`, `sft`, `own`, `dpo`, `pack`, `evaluate` or `baselines`.
        about: of which skill, by which model.
        way: what is done: asked of an endpoint, generated or read here, trained, packed.
        rows: answers, rows or pairs.
        tokens_in: that are read; of training, all of them, over all epochs.
        tokens_out: that are generated.
        flops: operations on this machine.
        model: that does it here.
        dollars: at an endpoint whose price is known.
        sequences: of `longest` tokens at once.
        longest: tokens of the longest sequence.
        options: of the training.
        trained: parameters that are trained.
    """

    stage: str
    about: str
    way: Way
    rows: float
    tokens_in: float
    tokens_out: float = 0
    flops: float = 0
    model: Sized | None = None
    dollars: float | None = None
    sequences: int = 1
    longest: int = 0
    options: TrainingOptions | None = None
    trained: int = 0

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.tokens_in + self.tokens_out


@dataclass(frozen=True)
class Asked:
    """A recipe with what is known of its models and prompts.

    Attributes:
        recipe: what is asked for.
        models: target, local sources and reward models, by the name in the recipe.
        prompts: by skill, and `general`.
        tests: by skill, and `general`.
        assumed: for what is not known.
        lora_parameters: that a LoRA trains, as the recipe's method or as a baseline.
    """

    recipe: Recipe
    models: Mapping[str, Sized]
    prompts: Mapping[str, Prompts]
    tests: Mapping[str, Prompts]
    assumed: Assumed
    lora_parameters: int = 0

    @property
    def target(self) -> Sized:
        """The model that is trained."""
        return self.models[self.recipe.target]

    @property
    def trained(self) -> int:
        """How many parameters the recipe's method trains."""
        return self.lora_parameters if self.recipe.method == "lora" else self.target.shape.parameters


def amounts(asked: Asked) -> list[Amount]:
    """Return the parts of a run, in the order in which they are done for each skill."""
    found = []
    for name in asked.recipe.skills:
        found += [*_sampled(asked, name), *_trained(asked, name, asked.trained), _packed(asked, name)]
        found += [*_evaluated(asked, name), *_baselines(asked, name)]
    return found


def _sampled(asked: Asked, name: str) -> Iterator[Amount]:
    skill, prompts = asked.recipe.skills[name], asked.prompts[name]
    longest_answer = answers = 0
    for source in skill.sources:
        options = source.sampling or asked.recipe.sampling
        yield _answers(asked, "sample", name, source, options, prompts, prompts.count)
        answers += prompts.count * options.samples
        longest_answer = max(longest_answer, options.max_new_tokens)
    yield from _judged(asked, "judge", name, answers, prompts.tokens, asked.assumed.answer(longest_answer))


def _answers(
    asked: Asked, stage: str, skill: str, source: SourceOptions, options: SamplingOptions, prompts: Prompts, count: int
) -> Amount:
    """Return what the answers of a source to `count` prompts take."""
    rows = count * options.samples
    written = rows * asked.assumed.answer(options.max_new_tokens)
    if source.url is not None:
        requests = count * -(-options.samples // source.samples_per_request)
        read = requests * prompts.tokens
        cost = dollars(source.price, round(read), round(written))
        return Amount(stage, f"{skill}, {source.name} (URL)", "endpoint", rows, read, written, dollars=cost)
    return _generated(stage, f"{skill}, {source.name}", asked.models[source.model], options, prompts, count, written)


def _generated(
    stage: str, about: str, model: Sized, options: SamplingOptions, prompts: Prompts, count: float, written: float
) -> Amount:
    rows = count * options.samples
    read = rows * prompts.tokens  # each sample reads its prompt
    longest, sequences = round(prompts.tokens) + options.max_new_tokens, options.batch_size * options.samples
    flops = 2 * model.shape.parameters * (read + written)
    return Amount(
        stage, about, "generate", rows, read, written, flops, model, sequences=sequences, longest=longest
    )  # fmt: skip


def _judged(asked: Asked, stage: str, skill: str, rows: float, prompt: float, answer: float) -> Iterator[Amount]:
    for judge in asked.recipe.skills[skill].judge:
        yield from _judgment(asked, stage, skill, judge, rows, prompt, answer)


def _judgment(
    asked: Asked, stage: str, skill: str, judge: JudgeOptions, rows: float, prompt: float, answer: float
) -> Iterator[Amount]:
    """Yield what a judge takes, if it is a model."""
    if isinstance(judge, RewardJudge):
        model, read = asked.models[judge.model], rows * min(prompt + answer, judge.max_length)
        about, flops = f"{skill}, {model.name}", 2 * model.shape.parameters * read
        yield Amount(
            stage, about, "read", rows, read, flops=flops, model=model, sequences=judge.batch_size,
            longest=judge.max_length,
        )  # fmt: skip
    elif isinstance(judge, LlmJudge):
        read, written = rows * (prompt + answer + _RUBRIC), rows * judge.max_new_tokens / 2
        cost = dollars(judge.price, round(read), round(written))
        yield Amount(stage, f"{skill}, {judge.model} (URL)", "endpoint", rows, read, written, dollars=cost)


def _trained(asked: Asked, name: str, trained: int) -> Iterator[Amount]:
    """Yield what learning a skill takes when so many parameters are trained."""
    recipe, skill, prompts = asked.recipe, asked.recipe.skills[name], asked.prompts[name]
    pairs, share = skill.pairs or recipe.pairs, (skill.pairs or recipe.pairs).sft_share
    most = max((source.sampling or recipe.sampling).max_new_tokens for source in skill.sources)
    length = prompts.tokens + asked.assumed.answer(most)
    rows = prompts.count * (share or 1) * (len(skill.sources) if pairs.sft == "each" else 1)
    yield _training(asked, "sft", name, recipe.sft, rows, length, trained, answers=1, reference=False)
    left = prompts.count * (1 if share is None else 1 - share)
    if recipe.dpo is None or not left:
        return
    if pairs.preference == "on_policy":
        options = recipe.sampling
        answer = asked.assumed.answer(options.max_new_tokens)
        written = left * options.samples * answer
        yield _generated("own", f"{name}, the target", asked.target, options, prompts, left, written)
        yield from _judged(asked, "own", name, left * options.samples, prompts.tokens, answer)
    groups = left * (len(skill.sources) if pairs.preference == "same_source" else 1)
    yield _training(asked, "dpo", name, recipe.dpo, groups, length, trained, answers=2, reference=True)


def _training(
    asked: Asked, stage: str, name: str, options: TrainingOptions, rows: float, length: float, trained: int, *,
    answers: int, reference: bool,
) -> Amount:  # fmt: skip
    """Return what training on rows takes: a pair is two answers, which DPO's reference reads once more."""
    parameters = asked.target.shape.parameters
    learnt = rows * (1 - options.held_out) * answers * min(length, options.max_length)
    each = 2 * parameters + 2 * parameters + 2 * trained  # forward, gradients of activations and of what is trained
    flops = learnt * (options.epochs * each + 2 * parameters * reference)
    return Amount(
        stage, name, "train", rows, learnt * options.epochs, flops=flops, model=asked.target, options=options,
        longest=answers * options.max_length, trained=trained,
    )  # fmt: skip


def _packed(asked: Asked, name: str) -> Amount:
    parameters, prompts = asked.target.shape.parameters, asked.prompts[name]
    rows = min(_CALIBRATION, prompts.count)
    read = _READINGS * rows * min(asked.recipe.sft.max_length, prompts.tokens + asked.assumed.answer(2048))
    return Amount("pack", name, "pack", rows, read, flops=2 * parameters * read, model=asked.target)


def _evaluated(asked: Asked, name: str) -> Iterator[Amount]:
    """Yield what scoring takes: base, tuned, pack and routed on the skill's tests, tuned on the general ones too."""
    recipe, skill = asked.recipe, asked.recipe.skills[name]
    greedy = recipe.sampling.model_copy(update={"samples": 1, "temperature": 0.0})
    general, share = asked.tests[GENERAL], 1 + 2 / len(recipe.skills)  # base and routed answer the general ones once
    tests, answer = asked.tests[name], asked.assumed.answer(greedy.max_new_tokens)
    count = 4 * tests.count + share * general.count
    tokens = (4 * tests.count * tests.tokens + share * general.count * general.tokens) / max(1, count)
    read = Prompts(round(count), tokens)
    yield _generated("evaluate", f"{name}, the target", asked.target, greedy, read, count, count * answer)
    for source in skill.sources:
        yield _answers(asked, "evaluate", name, source, greedy, tests, tests.count)
    judged = (4 + len(skill.sources)) * tests.count
    yield from _judgment(asked, "evaluate", name, skill.tested_by, judged, tests.tokens, answer)


def _baselines(asked: Asked, name: str) -> Iterator[Amount]:
    """Yield the trainings of the baselines; the first step of training in sequence is the skill's own, or its LoRA."""
    compare, first = asked.recipe.compare, name == next(iter(asked.recipe.skills))
    shared = {"sequential", "grafting", *(["sequential_lora"] if "lora" in compare else [])}
    for baseline in compare:
        if baseline == "summed" or (first and baseline in shared):
            continue
        for one in _trained(asked, name, asked.lora_parameters if baseline.endswith("lora") else asked.trained):
            if one.way == "train":
                yield replace(one, stage="baselines", about=f"{name}, {baseline} {one.stage}")
