"""What a recipe says of training: SFT, DPO, and the LoRA baseline."""

from pydantic import Field

from graftllm.transfer_options import Section


class TrainingOptions(Section):
    """What both training steps have in common."""

    epochs: float = Field(gt=0)
    batch_size: int = Field(default=128, ge=1, description="rows per optimizer step")
    learning_rate: float = Field(gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps, before a cosine decay")
    max_length: int = Field(default=2048, ge=2, description="tokens; longer rows are cut")


class SftOptions(TrainingOptions):
    """Supervised fine-tuning; defaults as published for Llama-3.1-8B (FuseChat 3.0)."""

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-6, gt=0)


class DpoOptions(TrainingOptions):
    """Preference tuning with DPO (arXiv 2305.18290), plus an optional SFT term on the chosen answer."""

    epochs: float = Field(default=1, gt=0)
    learning_rate: float = Field(default=8e-7, gt=0)
    beta: float = Field(default=0.1, gt=0)
    sft_weight: float = Field(default=0.0, ge=0, description="weight of the SFT term beside the DPO term")


class LoraOptions(Section):
    """Learning rates of the LoRA baseline; everything else is as for all parameters."""

    learning_rate: float = Field(default=2e-4, gt=0)
    dpo_learning_rate: float = Field(default=5e-6, gt=0)
