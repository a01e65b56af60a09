"""What a PEFT adapter's config says of its formula, and which adapters are no change of weights that can be merged."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from graftllm.errors import CheckpointError

CONFIG = "adapter_config.json"
MERGE = "Merge it with PEFT (merge_and_unload, then save_pretrained) and give the merged checkpoint instead."
_NEUTRAL_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # initial values that leave the base as it is
_HARMLESS = {  # settings that say where an adapter came from, or how it was trained, but not what it does
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "bias", "modules_to_save", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "lora_bias",
    "velora_config", "runtime_config",
}  # fmt: skip
_NO_WEIGHTS = (  # types that add inputs, or mix by what they read
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "XLORA", "POLY",
)  # fmt: skip
_MOST_OPEN = 3  # parts of a pattern that fit names in several ways, by whose product matching takes time
_PART = re.compile(
    r"""(?P<open>(?:\\[.dw-]|\[[\w-]+]|[\w.])[*+?]\??          # one character again and again
               |\((?:\?:)?(?P<words>(?:[\w|-]|\\\.)+)\))         # one of some words
      |(?P<fixed>\\[.dw-]|\[[\w-]+]|[\w.^$|-])
      |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_SHOWN = 80  # characters of a pattern in a message

Alpha = Annotated[float, Field(ge=-1e30, le=1e30)]  # what float32 can multiply with


class AdapterSettings(BaseModel):
    """An adapter's config: the names are PEFT's; settings that are not known here are kept to be looked at."""

    model_config = ConfigDict(extra="allow", frozen=True)
    peft_type: str
    r: int = Field(default=8, ge=1)
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Alpha] = {}
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        """Return the rank of the factors for one module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied with."""
        alpha, rank = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(directory: Path) -> AdapterSettings:
    """Read the config of an adapter's directory.

    Raises:
        CheckpointError: it is not there, not one, or of an adapter that cannot be merged into its base's weights.
    """
    path = directory / CONFIG
    try:
        config = AdapterSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: not an adapter's config ({where}: {first['msg']}); save it again.") from error
    if config.peft_type in _NO_WEIGHTS:
        raise CheckpointError(
            f"{path}: expected peft_type LORA (which rsLoRA and DoRA have, too), found {config.peft_type}, which "
            "changes no weights of the model: there is nothing to merge, and nothing that a pack could hold. Train a "
            "LoRA or the whole model on the same rows instead."
        )
    if config.peft_type != "LORA":
        raise CheckpointError(
            f"{path}: expected peft_type LORA (which rsLoRA and DoRA have, too), found {config.peft_type}. {MERGE}"
        )
    if config.init_lora_weights not in (*_NEUTRAL_STARTS, None):
        raise CheckpointError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}, which changes the base's own weights before "
            "training. Save the adapter with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not is_quick(pattern):
            raise CheckpointError(
                f"{path}: expected patterns of names with at most {_MOST_OPEN} parts such as .* or (q_proj|v_proj), "
                f"found {pattern[:_SHOWN]!r}, which could take for ever to match. Write the names out, or else: {MERGE}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {pattern!r} is no pattern of names ({error}); save it again.") from error
    odd = sorted(name for name, value in (config.model_extra or {}).items() if value and name not in _HARMLESS)
    if odd:
        raise CheckpointError(
            f"{path}: expected LoRA, rsLoRA or DoRA on whole matrices, found the setting {odd[0]}. {MERGE}"
        )
    return config


def is_quick(pattern: str) -> bool:
    r"""Return whether any name is soon compared with a pattern, a regular expression of a stranger's.

    >>> is_quick(r"^model\.layers\.[0-9]+\..*\.(q_proj|v_proj)"), is_quick("(a|aa)+"), is_quick("(a|a)b")
    (True, False, False)
    """
    parts = list(_PART.finditer(pattern))
    words = [part["words"].split("|") for part in parts if part["words"]]
    return (
        not any(part["other"] for part in parts)
        and sum(part["open"] is not None for part in parts) <= _MOST_OPEN
        and all(len(set(some)) == len(some) for some in words)
    )


def _pattern(patterns: Mapping[str, object], module: str) -> str:
    """Return the first pattern that fits the end of a module's name, as PEFT chooses it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
