"""SFT, then DPO, of all parameters (or of a LoRA adapter, for comparison), with TRL.

A killed training goes on from its last trainer checkpoint, which
lies in a hidden directory beside the result until the result is whole.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from graftllm.checkpoint import Checkpoint, copy_companions
from graftllm.errors import TrainingError
from graftllm.generation import load_tokenizer, resolve_device
from graftllm.progress import progress
from graftllm.records import Message, PreferencePair, Prompt
from graftllm.storage import whole_directory
from graftllm.training.lora import lora_settings, without_foreign_warnings
from graftllm.training_options import DpoOptions, SftOptions, TrainingOptions


@dataclass(frozen=True)
class Training:
    """What a training run has besides its rows and options.

    Attributes:
        model: checkpoint directory to start from.
        out: directory to write: a checkpoint like `model`, or a PEFT adapter for a LoRA.
        seed: of the data order and a LoRA's initial values.
        label: shown beside the progress bar and in errors.
        lora_rank: train a LoRA of this rank on every linear layer instead of all parameters.
        adapter: an adapter on `model` to train further instead.
        device: `auto` takes a GPU when there is one.
    """

    model: Path
    out: Path
    seed: int
    label: str
    lora_rank: int | None = None
    adapter: Path | None = None
    device: str = "auto"


def train_sft(run: Training, rows: Sequence[Prompt], options: SftOptions) -> None:
    """Minimise -log p(answer | question) over rows that end with an assistant message.

    Raises:
        TrainingError: there are no rows, a row has no answer, or the loss is not finite.
    """
    if unanswered := [row.id for row in rows if row.answer is None]:
        raise TrainingError(
            f"{run.label}: row {unanswered[0]!r} has no assistant message to learn; add one or drop the row."
        )
    data = [{"prompt": list(row.question), "completion": _turn(row.answer or "")} for row in rows]
    work = _work_directory(run, data, options)
    with without_foreign_warnings():
        trainer = SFTTrainer(
            model=_load(run),
            args=SFTConfig(**_arguments(run, work, options, len(data)), completion_only_loss=True),
            train_dataset=Dataset.from_list(data),
            processing_class=load_tokenizer(run.model),
            peft_config=lora_settings(run.lora_rank) if run.lora_rank else None,
        )
        _fit(trainer, run, work)


def train_dpo(run: Training, pairs: Sequence[PreferencePair], options: DpoOptions) -> None:
    """Minimise the DPO loss of preference pairs, with the model trained from as the reference.

    L = -log sigmoid(beta * [log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected)])
    (arXiv 2305.18290), plus `options.sft_weight` times the SFT loss of the chosen answer.

    Raises:
        TrainingError: there are no pairs, or the loss is not finite.
    """
    data = [
        {"prompt": list(pair.messages), "chosen": _turn(pair.chosen), "rejected": _turn(pair.rejected)}
        for pair in pairs
    ]
    work = _work_directory(run, data, options)
    terms = {"sigmoid": 1.0, "sft": options.sft_weight} if options.sft_weight else {"sigmoid": 1.0}
    with without_foreign_warnings():
        trainer = DPOTrainer(
            model=_load(run),
            args=DPOConfig(
                **_arguments(run, work, options, len(data)),
                beta=options.beta,
                loss_type=list(terms),
                loss_weights=list(terms.values()),
                precompute_ref_log_probs=True,  # the reference goes first, so one model is in memory, not two
            ),
            train_dataset=Dataset.from_list(data),
            processing_class=load_tokenizer(run.model),
        )
        _fit(trainer, run, work)


def _turn(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def _work_directory(run: Training, data: list[dict[str, Any]], options: TrainingOptions) -> Path:
    """Return where this training's trainer checkpoints lie; those of another training are deleted."""
    if not data:
        raise TrainingError(f"{run.label}: expected rows to train on, found none.")
    about = [str(run.model), str(run.adapter), run.lora_rank, run.seed, options.model_dump(), data]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    work = run.out.with_name(f".{run.out.name}.training")
    if not (work / key).exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / key).touch()
    return work


def _load(run: Training) -> PreTrainedModel | peft.PeftModel:
    """Load in float32: the optimizer's steps would vanish in 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    return model if run.adapter is None else peft.PeftModel.from_pretrained(model, run.adapter, is_trainable=True)


def _arguments(run: Training, work: Path, options: TrainingOptions, rows: int) -> dict[str, Any]:
    """Return what SFTConfig and DPOConfig have in common."""
    on_cpu = resolve_device(run.device).type == "cpu"
    steps = _steps(options, rows)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    return {
        "output_dir": str(work),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(options.warmup * steps),
        "max_length": options.max_length,
        "seed": run.seed,
        "save_strategy": "steps",
        "save_steps": max(1, steps // 8),
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 50),
        "logging_nan_inf_filter": False,  # a diverged training must be seen
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "activation_checkpointing": not on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }


def _steps(options: TrainingOptions, rows: int) -> int:
    return math.ceil(options.epochs * math.ceil(rows / options.batch_size))


def _fit(trainer: Trainer, run: Training, work: Path) -> None:
    """Train from the last whole trainer checkpoint on, then write `run.out` and drop the work directory."""
    trainer.remove_callback(PrinterCallback)
    with progress(run.label) as show:
        trainer.add_callback(_ShowSteps(show))
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(loss) for loss in losses):
        raise TrainingError(f"{run.label}: the loss became {losses[-1]}; lower the learning rate or check the rows.")
    model: Any = trainer.model
    base = Checkpoint.open(run.model)
    with whole_directory(run.out) as partial:
        model.to(base.dtype).save_pretrained(partial)
        if not isinstance(model, peft.PeftModel):
            copy_companions(base, partial)
    shutil.rmtree(work)


class _ShowSteps(TrainerCallback):
    def __init__(self, show: Callable[[int, int], None]) -> None:
        self.show = show

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.show(state.global_step, state.max_steps)


def _last_whole_checkpoint(work: Path) -> str | None:
    """Return the newest trainer checkpoint that was finished; the trainer writes its state last."""
    numbered = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(numbered):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None
