"""What looks on while TRL trains: a progress bar, the curves, and an end at once where the loss is no number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import TrainerCallback, TrainerState
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from graftllm.errors import TrainingError
from graftllm.training.curves import write_curves
from graftllm.training_options import Reporter


class Finite(Trainer):
    """Stops at the first loss that is not finite."""

    label = "training"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step; see `Trainer`.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            rate = self._get_learning_rate()
            raise TrainingError(
                f"{self.label}: the loss became {float(loss)} in step {self.state.global_step + 1} of "
                f"{self.state.max_steps}, at a learning rate of {rate:.2g}; lower `learning_rate` "
                f"({self.args.learning_rate:g} at its highest), raise `warmup`, or look for broken rows."
            )
        return loss


class FiniteSft(Finite, SFTTrainer):
    """TRL's SFT, stopped at the first loss that is not finite."""


class FiniteDpo(Finite, DPOTrainer):
    """TRL's DPO, stopped at the first loss that is not finite."""


class ShowSteps(TrainerCallback):
    """Moves a progress bar."""

    def __init__(self, show: Callable[[int, int], None]) -> None:
        """Take what shows how many steps are done, and of how many."""
        self.show = show

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show a step."""
        self.show(state.global_step, state.max_steps)


class KeepCurves(TrainerCallback):
    """Writes the curves anew whenever something is logged."""

    def __init__(self, path: Path) -> None:
        """Take the file to write."""
        self.path = path

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write all rows, those of before a kill included."""
        if state.is_world_process_zero:
            write_curves(state.log_history, self.path)


def reporting(reporter: Reporter | None, out: Path, label: str) -> list[TrainerCallback]:
    """Return what tells TensorBoard (in `OUT.tensorboard`) or Weights & Biases of a training.

    Raises:
        TrainingError: the library is not installed.
    """
    if reporter is None:
        return []
    is_there = {
        "tensorboard": integration_utils.is_tensorboard_available,
        "wandb": integration_utils.is_wandb_available,
    }[reporter]
    if not is_there():
        package = {"tensorboard": "'graftllm[tensorboard]'", "wandb": "wandb"}[reporter]
        raise TrainingError(
            f"{label}: report_to asks for {reporter}, which is not installed here; `pip install {package}`, "
            "or leave report_to out: the curves are kept beside the model anyway."
        )
    if reporter == "wandb":
        return [WandbCallback()]
    told = TensorBoardCallback()
    told.logging_dir = str(out.with_name(f"{out.name}.tensorboard"))
    return [told]
