"""What a recipe says of training: SFT, DPO, and LoRAs.

Learning rates and the preference loss that a recipe does not name are chosen by the target's family
and size (`training/defaults.py`). What is switched off is left out when options are written.
"""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from graftllm.transfer_options import Section

PreferenceLoss = Literal["sigmoid", "length_normalised"]
Reporter = Literal["tensorboard", "wandb"]
_OFF = {"micro_batch": None, "held_out": 0, "early_stop": None, "packing": False}


class TrainingOptions(Section):
    """What both training steps have in common."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(default=128, ge=1, description="rows per optimizer step")
    learning_rate: float = Field(gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps, before a cosine decay")
    max_length: int = Field(default=2048, ge=2, description="tokens; longer rows are cut")
    micro_batch: int | None = Field(
        default=None, ge=1, description="rows in a device's memory at once; as many as fit if null"
    )
    held_out: float = Field(
        default=0, ge=0, le=0.5, description="share of the rows that is not learnt but measured; the best model is kept"
    )
    early_stop: int | None = Field(
        default=None, ge=1, description="measurements on held-out rows without a better one, after which to stop"
    )

    @model_validator(mode="after")
    def _stops_by_something(self) -> "TrainingOptions":
        if self.early_stop is not None and not self.held_out:
            raise ValueError("early_stop: needs rows that are not learnt; add `held_out`, such as 0.05")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key not in _OFF or value != _OFF[key]}


class SftOptions(TrainingOptions):
    """Supervised fine-tuning; defaults as published for Llama-3.1-8B (FuseChat 3.0)."""

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)
    packing: bool = Field(
        default=False, description="several rows in one sequence of `max_length`; `batch_size` then counts sequences"
    )


class DpoOptions(TrainingOptions):
    """Preference tuning with DPO (arXiv 2305.18290), plus an optional SFT term on the chosen answer."""

    epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=8e-7, gt=0)
    loss: PreferenceLoss = Field(default="sigmoid", description="of log-ratios, or of log-ratios a token of the answer")
    beta: float = Field(default=0.1, gt=0, description="weight of the log-ratios; of about 10 when length-normalised")
    sft_weight: float = Field(default=0.0, ge=0, description="weight of the SFT term beside the DPO term")


class LoraOptions(Section):
    """What is different when a LoRA is trained."""

    rank: int | None = Field(default=None, ge=1, description="as many bytes as the pack has or may have if null")
    learning_rate: float = Field(default=2e-4, gt=0)
    dpo_learning_rate: float = Field(default=5e-6, gt=0)
