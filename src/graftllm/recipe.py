"""Every knob of a run, with its default: strict YAML in, YAML out.

A recipe says what to transfer (sources, prompts, tests), into what (target) and how. Each
section is the options object that its room takes. Unknown keys are errors. The sections on
prompts, sources, judges and pairs are in `transfer_options`, those on training in `training_options`,
the one on packs in `packing_options`.
"""

import difflib
import os
import reprlib
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from graftllm.errors import RecipeError
from graftllm.packing_options import PackOptions, Strategy
from graftllm.training_options import DpoOptions, LoraOptions, Reporter, SftOptions
from graftllm.transfer_options import (
    ContaminationOptions,
    General,
    PairOptions,
    PromptSet,
    RewardJudge,
    SamplingOptions,
    Section,
    Skill,
    is_template,
)

Comparison = Literal["sequential", "sequential_lora", "replay", "grafting", "summed", "lora"]
PACK_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of files and headers, too, which not every alphabet fits
RESERVED = ("base", "auto", "by-task", "general")  # what names other things than packs
PackName = typing.Annotated[str, Field(pattern=f"^{PACK_NAME}$")]
Options = typing.TypeVar("Options", bound=Section)


class RouterOptions(Section):
    """How the router is trained and when it answers `base`."""

    layer: int = Field(default=1, ge=1, description="after how many layers of the base its hidden states are read")
    threshold: float = Field(
        default=0.5, ge=0, lt=1, description="below this probability of all packs together, the base answers"
    )
    false_accept: float = Field(
        default=0.01, gt=0, lt=1, description="share of fresh general prompts that may go to a pack, on average"
    )
    samples: int = Field(
        default=128, ge=8, description="prompts of each pack that the router keeps; of general ones twice as many"
    )
    steps: int = Field(default=300, ge=1, le=100_000)
    drift: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of any old class's held-out examples that may go elsewhere when a pack joins",
    )
    soft: int = Field(default=1, ge=1, description="packs that may answer together, weighted by their probabilities")


class Recipe(Section):
    """A whole run, from prompts to a grafted model."""

    name: PackName
    target: str
    skills: dict[PackName, Skill] = Field(min_length=1)
    general: General
    seed: int = 0
    contamination: ContaminationOptions = ContaminationOptions()
    sampling: SamplingOptions = SamplingOptions()
    pairs: PairOptions = PairOptions()
    sft: SftOptions = SftOptions()
    dpo: DpoOptions | None = DpoOptions()
    method: Literal["full", "lora"] = Field(default="full", description="train all parameters, or a LoRA to merge")
    pack: PackOptions = PackOptions()
    router: RouterOptions = RouterOptions()
    compare: tuple[Comparison, ...] = Field(default=(), description="baselines to run beside the packs")
    lora: LoraOptions = LoraOptions()
    report_to: Reporter | None = Field(default=None, description="besides the curves that are kept anyway")

    @model_validator(mode="after")
    def _lora_has_a_rank(self) -> "Recipe":
        if self.method == "lora" and self.lora.rank is None and self.pack.divergence is not None:
            raise ValueError("lora: pack.budget says nothing of its bytes; add a `rank`, such as 16")
        return self

    @model_validator(mode="after")
    def _added_tokens_are_trained(self) -> "Recipe":
        if self.method == "lora" and any(skill.added_tokens for skill in self.skills.values()):
            raise ValueError("added_tokens: a LoRA trains no embedding rows; take `method: full`, or leave them out")
        return self

    @model_validator(mode="after")
    def _summed_vocabularies_are_one(self) -> "Recipe":
        if "summed" in self.compare and len({skill.added_tokens for skill in self.skills.values()}) > 1:
            raise ValueError(
                "added_tokens: packs of different vocabularies have no sum; give all skills the same, or take `summed` "
                "out of compare"
            )
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> "Recipe":
        if taken := set(RESERVED) & set(self.skills):
            raise ValueError(f"skills: {sorted(taken)[0]!r} is a reserved name; choose another")
        return self


def load_recipe(path: Path, directory: Path | None = None) -> tuple[Recipe, Path]:
    """Read a recipe; return it with its paths made absolute, and the run's directory.

    `{dir}` in a path stands for the run's directory, other relative paths start at the recipe.

    Args:
        path: a YAML file.
        directory: of the run; `runs/NAME` by default.

    Raises:
        RecipeError: the file is missing, is not YAML, or has a key or value that is not known here.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe; recipes/ has examples to start from.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected keys such as target and skills, found {type(content).__name__}.")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from error
    directory = directory or Path("runs") / recipe.name
    return _with_paths(recipe, path.parent.absolute(), directory.absolute()), directory


def check_target_made(recipe: Recipe, directory: Path) -> None:
    """Check that a target which lies in the run's own directory has been put there.

    Raises:
        RecipeError: nothing is there.
    """
    target = Path(recipe.target)
    if target.is_relative_to(directory.absolute()) and not target.exists():
        raise RecipeError(
            f"target: {target} is in the run's own directory, and not there yet; make it first, as "
            f"`graftllm demo --dir {directory}` does for recipes/demo.yaml."
        )


def pack_options(
    *,
    strategy: Strategy,
    budget: str | None,
    energy: float | None,
    density: float | None,
    bit_bands: str | None,
    group_size: int | None,
    servable: int | None = None,
    distill: int | None = None,
) -> PackOptions:
    """Return pack options with the given values; None stands for the default.

    Args:
        strategy: as in a recipe, like all others but `bit_bands`.
        budget: size of the file, or the KL divergence that it may have.
        energy: share of squared singular values kept.
        density: share kept of embedding and head deltas.
        bit_bands: such as `8:0.02,4:0.18,2:0.8`.
        group_size: values that share one scale.
        servable: largest rank of linear layers.
        distill: steps that train the codes.

    Raises:
        RecipeError: a value is out of range.
    """
    given = {"strategy": strategy, "budget": budget, "energy": energy, "density": density, "group_size": group_size}
    given |= {"servable": servable, "distill": distill}
    if bit_bands is not None:
        given["bit_bands"] = [band.split(":") for band in bit_bands.split(",")]
    return options_of(PackOptions, given)


def options_of(section: type[Options], given: Mapping[str, Any]) -> Options:
    """Return a section of a recipe with the given values; None stands for the default.

    Raises:
        RecipeError: a value is out of range.
    """
    try:
        return section.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key written twice, where PyYAML keeps the last one silently.

    It also bounds merges (`<<`), with which a file of a few lines could fill the memory.
    """

    merged_keys = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of `node`."""
        seen = set()
        for own in (key for key, _ in node.value if key.tag != _MERGE):
            key = self.construct_object(own, deep=deep)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice, the second time in line {own.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Put the keys of the mapping that `<<` names, if any, into `node`."""
        merged = [value for key, value in node.value if key.tag == _MERGE]
        if len(merged) > 1 or any(isinstance(value, yaml.SequenceNode) for value in merged):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: expected '<<' once, with one mapping; found several"
            )
        super().flatten_mapping(node)
        self.merged_keys += len(node.value) if merged else 0
        if self.merged_keys > _MOST_MERGED_KEYS:
            raise yaml.YAMLError(f"expected mappings of at most {_MOST_MERGED_KEYS} keys by '<<', found more")


_MERGE, _MOST_MERGED_KEYS = "tag:yaml.org,2002:merge", 100_000


_SHOWN = reprlib.Repr()  # a value of aliases within aliases could fill the memory
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 4, 90, 90, 90
_SHOWN.maxdict = _SHOWN.maxlist = _SHOWN.maxtuple = 20


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    unknown = (one for one in problems if one["type"] == "extra_forbidden")
    first = next(unknown, problems[0])  # a key that is missing may be there under a wrong name
    location = [part for part in first["loc"] if isinstance(part, str)]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)[0]
        return f"unknown key {where!r}; the nearest known one is {near!r} (known here: {', '.join(known)})."
    if first["type"] == "missing":
        return f"key {where!r} is missing, and it has no default."
    if first["type"] == "union_tag_not_found":
        return f"key {where + '.kind'!r} is missing, and it has no default."
    if first["type"] == "union_tag_invalid":
        told = first.get("ctx", {})
        return f"{where}: expected a kind among {told['expected_tags']}; found {told['tag']!r}."
    message, found = first["msg"].removeprefix("Value error, ").removesuffix("."), _SHOWN.repr(first["input"])
    in_message = first["type"] == "value_error" and isinstance(first["input"], dict)  # which of the keys is wrong
    if not where or in_message or location[-1:] == ["url"]:  # a URL may hold a password
        return f"{where + ': ' if where else ''}{message}."
    return f"{where}: {message}; found {found if len(found) <= 80 else found[:77] + '...'}."


def _keys_at(location: list[str]) -> list[str]:
    """Return the keys that the section at `location` knows."""
    sections: list[type[BaseModel]] = [Recipe]
    parts = iter(location)
    for part in parts:
        known = [section.model_fields[part] for section in sections if part in section.model_fields]
        if known:
            sections = _sections(known[0].annotation)
            if typing.get_origin(known[0].annotation) is dict:
                next(parts, None)  # a name of the user's
        else:
            sections = [section for section in sections if part in _kinds(section)]
    return list(sections[0].model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a type holds, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in _sections(inner)]


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    return typing.get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _with_paths(recipe: Recipe, home: Path, directory: Path) -> Recipe:
    def located(text: str) -> str:
        return str(home / os.path.expanduser(text.replace("{dir}", str(directory))))

    def model(text: str) -> str:
        """Keep a Hub id such as `org/name` unless a directory of that name is there."""
        is_path = "{dir}" in text or text.startswith((".", "/", "~")) or (home / text).exists()
        return located(text) if is_path else text

    def sets(given: tuple[PromptSet, ...]) -> tuple[PromptSet, ...]:
        return tuple(
            one.model_copy(
                update={"files": tuple(map(located, one.files)), "dataset": one.dataset and model(one.dataset)}
            )
            for one in given
        )

    def here(section: Any) -> Any:
        """Locate the model of a source or judge that runs on this machine."""
        is_here = isinstance(section, RewardJudge) or getattr(section, "url", "none") is None
        template = getattr(section, "chat_template", None)
        paths = {"chat_template": located(template)} if template and not is_template(template) else {}
        return section.model_copy(update={"model": model(section.model), **paths}) if is_here else section

    def prompts(section: Any) -> dict[str, Any]:
        return {"prompts": sets(section.prompts), "test": sets(section.test)}

    def skill(given: Skill) -> Skill:
        judges, sources = tuple(map(here, given.judge)), tuple(map(here, given.sources))
        return given.model_copy(update=prompts(given) | {"judge": judges, "sources": sources})

    return recipe.model_copy(
        update={
            "target": model(recipe.target),
            "skills": {name: skill(given) for name, given in recipe.skills.items()},
            "general": recipe.general.model_copy(update=prompts(recipe.general)),
            "contamination": recipe.contamination.model_copy(update={"against": sets(recipe.contamination.against)}),
        }
    )
