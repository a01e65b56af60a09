"""What a recipe says of packs: how a delta becomes a file, and how large that may be.

What is switched off is left out when options are written.
"""

import math
import re
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from graftllm.errors import RecipeError
from graftllm.transfer_options import Section

Strategy = Literal["auto", "paper", "exact"]
DEFAULT_SHARE = 0.05  # of the tuned checkpoint's bytes, where no budget is given
SERVED_RANK = 16  # of `servable` without a rank: vLLM's own `--max-lora-rank`


class PackOptions(Section):
    """How a delta becomes a SkillPack."""

    strategy: Strategy = "auto"
    budget: str | None = Field(
        default=None,
        description="5% of the tuned checkpoint, 400MB, 60KB or bytes; kl=0.01 for a fidelity instead; for exact, "
        "of a lossy layer under the exact one",
    )
    servable: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="keep weights of linear layers at this rank or below, but embedding and head, as LoRA servers need "
        "it; true is 16",
    )
    distill: int | None = Field(
        default=None,
        ge=1,
        description="steps of 32 calibration rows that train the codes to answer as the tuned model does (auto only)",
    )
    density: float = Field(default=0.97, gt=0, le=1, description="share kept of embedding and head deltas")
    energy: float = Field(
        default=0.95, gt=0, le=1, description="share of squared singular values kept; a budget overrides it"
    )
    bit_bands: tuple[tuple[int, float], ...] = Field(
        default=((8, 0.02), (4, 0.18), (2, 0.80)),
        max_length=8,
        description="bits and share of the kept singular vectors, strongest first",
    )
    group_size: int = Field(default=128, ge=8, le=1 << 20, description="values that share one scale")

    @model_serializer(mode="wrap")
    def _only_what_is_on(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key != "distill" or value is not None}

    @property
    def layered(self) -> bool:
        """Whether a lossy layer is asked for, and an exact one on top of it."""
        return self.strategy == "exact" and self.budget is not None

    @property
    def divergence(self) -> float | None:
        """The KL divergence that the budget asks for; None where it is a size, or there is none."""
        return None if self.budget is None else kl_target(self.budget)

    @field_validator("budget", mode="before")
    @classmethod
    def _bytes_without_quotes(cls, given: Any) -> Any:
        return str(given) if type(given) is int else given

    @field_validator("servable", mode="before")
    @classmethod
    def _rank_where_none_is_named(cls, given: Any) -> Any:
        return (SERVED_RANK if given else None) if isinstance(given, bool) else given

    @model_validator(mode="after")
    def _bands_cover_everything(self) -> "PackOptions":
        if any(not (1 <= bits <= 8 and share > 0) for bits, share in self.bit_bands):
            raise ValueError("bit_bands: expected pairs of 1 to 8 bits and a share above 0")
        if not abs(sum(share for _, share in self.bit_bands) - 1) <= 1e-6:
            raise ValueError("bit_bands: expected shares that sum to 1")
        return self

    @model_validator(mode="after")
    def _options_are_of_the_strategy(self) -> "PackOptions":
        """Refuse what would be ignored."""
        for key in ("density", "energy", "bit_bands", "group_size"):
            if self.strategy != "paper" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: is an option of the strategy paper, found {self.strategy}; leave it out")
        if self.servable and not (self.strategy == "auto" or self.layered):
            raise ValueError(
                f"servable: bounds the ranks of the strategy auto, found {self.strategy}; leave it out"
                + (", or give a budget for a lossy layer" if self.strategy == "exact" else "")
            )
        return self

    @model_validator(mode="after")
    def _budget_is_an_amount(self) -> "PackOptions":
        if self.budget is not None:
            try:
                if kl_target(self.budget) is None:
                    budget_bytes(self.budget, 1)
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _distilled_is_sized(self) -> "PackOptions":
        if self.distill and self.strategy != "auto":
            raise ValueError(f"distill: trains codes of the strategy auto, found {self.strategy}; leave it out")
        if self.distill and self.divergence is not None:
            raise ValueError(
                f"distill: would learn from the rows that a budget of {self.budget} is measured on; "
                "give a size, such as 5%"
            )
        return self


_MOST = 2.0**63  # bytes of a budget
_FEWEST = 101  # bytes; a smaller number was meant as a share


def budget_bytes(budget: str, tuned_bytes: int) -> int:
    """Return a budget such as `5%`, `400MB`, `60KB` or `123456` in bytes; `%` is of `tuned_bytes`.

    >>> budget_bytes("5%", 1000), budget_bytes("60KB", 0), budget_bytes("1.5 MB", 0)
    (50, 60000, 1500000)

    Raises:
        RecipeError: the text is no such amount.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMG]?B)?", budget.strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"budget: expected a share or a size above 0, such as 5%, 400MB or 60KB; found {budget!r}.")
    if match[2] is None and float(match[1]) < _FEWEST:
        raise RecipeError(f"budget: {budget} is so many bytes, which hold no pack; for a share write {budget}%.")
    unit = (match[2] or "B").upper()
    scale = tuned_bytes / 100 if unit == "%" else {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    amount = float(match[1]) * scale
    if amount >= _MOST:
        raise RecipeError(f"budget: expected less than 2 ** 63 bytes, found {budget[:20]!r}.")
    return int(amount)


def kl_target(budget: str) -> float | None:
    """Return the KL divergence, in nats a token, that a budget such as `kl=0.01` asks for; None for a size.

    >>> kl_target("kl=0.01"), kl_target("5%")
    (0.01, None)

    Raises:
        RecipeError: the number is none, or not above 0.
    """
    match = re.fullmatch(r"kl\s*=\s*(\S+)", budget.strip(), flags=re.IGNORECASE)
    if match is None:
        return None
    try:
        target = float(match[1])
    except ValueError:
        target = 0.0
    if not 0 < target < math.inf:
        raise RecipeError(f"budget: expected a divergence above 0, such as kl=0.01; found {budget!r}.")
    return target
