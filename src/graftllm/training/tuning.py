"""SFT, then DPO, of all parameters or of a LoRA adapter, with TRL.

A killed training goes on from its last trainer checkpoint, which lies in a hidden directory beside
the result until the result is whole.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import peft
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from graftllm.checkpoint import WRITTEN, Checkpoint, copy_companions
from graftllm.devices import resolve_device
from graftllm.errors import TrainingError
from graftllm.launched import leads, processes, sharded, wait_until
from graftllm.loading import load_tokenizer, open_model
from graftllm.progress import progress, say
from graftllm.records import Message, PreferencePair, Prompt
from graftllm.stages import files_of
from graftllm.storage import check_replaceable, whole_directory
from graftllm.training.curves import curves_beside, draw_curves
from graftllm.training.defaults import batching_for, dpo_for, sft_for
from graftllm.training.lengths import Row, longest
from graftllm.training.lora import lora_settings, without_foreign_warnings
from graftllm.training.watching import FiniteDpo, FiniteSft, KeepCurves, ShowSteps, reporting
from graftllm.training_options import DpoOptions, Reporter, SftOptions, TrainingOptions

_OVER = ("config.json", "adapter_config.json")  # of which a directory that a training wrote holds one, and
_HOLDS = (*WRITTEN, "README.md")  # no others than these


@dataclass(frozen=True)
class Training:
    """What a training run has besides its rows and options.

    Attributes:
        model: checkpoint directory to start from.
        out: directory to write: a checkpoint like `model`, or a PEFT adapter for a LoRA. The curves go beside it, as
            `OUT.curves.jsonl` and `OUT.curves.png`.
        seed: of the data order, the rows held out and a LoRA's initial values.
        label: shown beside the progress bar and in errors.
        lora_rank: train a LoRA of this rank on every linear layer instead of all parameters.
        adapter: an adapter on `model` to train further instead.
        added_tokens: that SFT of all parameters adds to the vocabulary, as far as `model` lacks them; `out` then has
            the longer tokenizer, and an embedding with as many rows.
        device: `auto` takes a GPU when there is one.
        report_to: who else is told of the curves.
    """

    model: Path
    out: Path
    seed: int
    label: str
    lora_rank: int | None = None
    adapter: Path | None = None
    added_tokens: tuple[str, ...] = ()
    device: str = "auto"
    report_to: Reporter | None = None


def train_sft(run: Training, rows: Sequence[Prompt], options: SftOptions) -> None:
    """Minimise -log p(answer | question) over rows that end with an assistant message.

    What the options leave open is chosen for the model.

    Raises:
        TrainingError: there are no rows, a row has no answer, the loss is not finite, a library is missing, or a LoRA
            should add tokens.
    """
    if run.added_tokens and (run.lora_rank or run.adapter):
        raise TrainingError(
            f"{run.label}: added_tokens need new embedding rows, which a LoRA does not train; train all parameters "
            "(`method: full`), or leave added_tokens out."
        )
    if unanswered := [row.id for row in rows if row.answer is None]:
        raise TrainingError(
            f"{run.label}: row {unanswered[0]!r} has no assistant message to learn; add one or drop the row."
        )
    options = sft_for(options, Checkpoint.open(run.model))
    data = [{"prompt": list(row.question), "completion": _turn(row.answer or "")} for row in rows]
    work = _work_directory(run, data, options)
    learnt, held_out = _split(data, options, run, work)
    words = _with_tokens(load_tokenizer(run.model), run.added_tokens)
    tokens = longest(words, data, options.max_length, run.label)
    arguments = _arguments(run, work, options, options.max_length if options.packing else tokens)
    with without_foreign_warnings():
        trainer = FiniteSft(
            callbacks=_callbacks(run, options),
            model=_load(run, len(words)),
            args=_alone(SFTConfig(**arguments, completion_only_loss=True, packing=options.packing)),
            train_dataset=learnt,
            eval_dataset=held_out,
            processing_class=words,
            peft_config=lora_settings(run.lora_rank) if run.lora_rank else None,
        )
        _fit(trainer, run, work)


def train_dpo(run: Training, pairs: Sequence[PreferencePair], options: DpoOptions) -> None:
    """Minimise the DPO loss of preference pairs, with the model trained from as the reference.

    L = -log sigmoid(beta * [log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected)])
    (arXiv 2305.18290), plus `options.sft_weight` times the SFT loss of the chosen answer. The length-normalised
    loss divides each of the two log-ratios by the tokens of its answer (arXiv 2503.04222).
    What the options leave open is chosen for the model.

    Raises:
        TrainingError: there are no pairs, the loss is not finite, or a library is missing.
    """
    options = dpo_for(options, Checkpoint.open(run.model))
    data = [
        {"prompt": list(pair.messages), "chosen": _turn(pair.chosen), "rejected": _turn(pair.rejected)}
        for pair in pairs
    ]
    work = _work_directory(run, data, options)
    learnt, held_out = _split(data, options, run, work)
    words = load_tokenizer(run.model)
    terms = {_LOSSES[options.loss]: 1.0} | ({"sft": options.sft_weight} if options.sft_weight else {})
    with without_foreign_warnings():
        trainer = FiniteDpo(
            callbacks=_callbacks(run, options),
            model=_load(run),
            args=_alone(
                DPOConfig(
                    **_arguments(run, work, options, longest(words, data, options.max_length, run.label)),
                    beta=options.beta,
                    loss_type=list(terms),
                    loss_weights=list(terms.values()),
                    precompute_ref_log_probs=True,  # the reference goes first, so one model is in memory, not two
                )
            ),
            train_dataset=learnt,
            eval_dataset=held_out,
            processing_class=words,
        )
        _fit(trainer, run, work)


_Arguments = TypeVar("_Arguments", SFTConfig, DPOConfig)


def _alone(args: _Arguments) -> _Arguments:
    """Keep one process to one GPU: the Trainer would spread it over all, each with the rows that one was to have."""
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


_LOSSES = {"sigmoid": "sigmoid", "length_normalised": "sigmoid_norm"}  # ours and TRL's


def _turn(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def _work_directory(run: Training, data: list[Row], options: TrainingOptions) -> Path:
    """Return where this training's trainer checkpoints lie; those of another training are deleted."""
    if not data:
        raise TrainingError(f"{run.label}: expected rows to train on, found none.")
    check_replaceable(run.out, over=_OVER, holds=_HOLDS, beside=[run.model])
    models = [
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(path)]
        for path in (run.model, run.adapter)
        if path is not None
    ]
    about = [models, run.lora_rank, run.seed, options.model_dump(), data, *run.added_tokens]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    work = run.out.with_name(f".{run.out.name}.training")
    if leads() and not (work / key).exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / key).touch()
    wait_until((work / key).exists)
    return work


def _split(data: list[Row], options: TrainingOptions, run: Training, work: Path) -> tuple[Dataset, Dataset | None]:
    """Return the rows to learn, and those held out if any are."""
    if not options.held_out:
        return _shared(data, work / "learnt"), None
    if len(data) < 2:
        raise TrainingError(f"{run.label}: held_out needs at least 2 rows, found {len(data)}; leave it out.")
    count = max(1, round(options.held_out * len(data)))
    held_out = set(random.Random(run.seed).sample(range(len(data)), count))
    learnt = [row for i, row in enumerate(data) if i not in held_out]
    return _shared(learnt, work / "learnt"), _shared([data[i] for i in sorted(held_out)], work / "held_out")


def _shared(data: list[Row], path: Path) -> Dataset:
    """Return rows as TRL takes them; those of several processes lie in files, where TRL shares what it computes."""
    if processes() == 1:
        return Dataset.from_list(data)
    if leads() and not path.exists():
        datasets.disable_progress_bars()
        with whole_directory(path) as partial:
            Dataset.from_list(data).save_to_disk(partial)
    wait_until(path.exists)
    return Dataset.load_from_disk(path)


def _with_tokens(tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> PreTrainedTokenizerBase:
    tokenizer.add_tokens(list(added))
    return tokenizer


def _load(run: Training, vocabulary: int = 0) -> PreTrainedModel | peft.PeftModel:
    """Load in float32: the optimizer's steps would vanish in 16 bits. New embedding rows are drawn like old ones."""
    model = open_model(run.model, torch.float32)
    if run.added_tokens and vocabulary > _embedded(model):
        torch.manual_seed(run.seed)
        model.resize_token_embeddings(vocabulary)
    if resolve_device(run.device).type == "cuda" and is_flash_attn_2_available() and model._supports_flash_attn:
        model.set_attn_implementation("flash_attention_2")
    return model if run.adapter is None else peft.PeftModel.from_pretrained(model, run.adapter, is_trainable=True)


def _embedded(model: Any) -> int:
    """Return how many rows a model's embedding has."""
    return len(model.get_input_embeddings().weight)


def _arguments(run: Training, work: Path, options: TrainingOptions, tokens: int) -> Row:
    """Return what SFTConfig and DPOConfig have in common; `tokens` are those of the longest row."""
    device = resolve_device(run.device)
    model = Checkpoint.open(run.model)
    trained = model.parameters if run.lora_rank is None and run.adapter is None else 0
    batching = batching_for(options, model, tokens=tokens, device=device, trained=trained, label=run.label)
    say(
        f"{run.label}: learning rate {options.learning_rate:g}, {options.batch_size} rows a step, "
        f"{batching.rows} at once{', activations computed twice' if batching.checkpointing else ''}"
    )
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    return {
        "output_dir": str(work),
        "run_name": run.label,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": batching.rows,
        "per_device_eval_batch_size": batching.rows,
        "gradient_accumulation_steps": batching.accumulate,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.warmup,  # below 1 it is a share of the steps, like the three below
        "save_steps": 1 / 8,
        "eval_steps": 1 / 8,
        "logging_steps": 1 / 50,
        "max_length": options.max_length,
        "seed": run.seed,
        "save_strategy": "steps",
        "save_total_limit": 1,
        "eval_strategy": "steps" if options.held_out else "no",
        "load_best_model_at_end": bool(options.held_out),
        "metric_for_best_model": "eval_loss" if options.held_out else None,
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": device.type != "cpu",
        "activation_checkpointing": batching.checkpointing,
        "dataloader_pin_memory": device.type != "cpu",
    }


def _callbacks(run: Training, options: TrainingOptions) -> list[TrainerCallback]:
    stopping = [EarlyStoppingCallback(options.early_stop)] if options.early_stop else []
    return [KeepCurves(curves_beside(run.out)[0]), *stopping, *reporting(run.report_to, run.out, run.label)]


def _fit(trainer: FiniteSft | FiniteDpo, run: Training, work: Path) -> None:
    """Train from the last whole trainer checkpoint on, then write `run.out` and drop the work directory."""
    trainer.label = run.label
    trainer.remove_callback(PrinterCallback)
    with progress(run.label) as show:
        trainer.add_callback(ShowSteps(show))
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work))
    accelerator: Any = trainer.accelerator
    # Every process gives its share of the weights; only the first gets them all.
    gathered = accelerator.get_state_dict(trainer.model_wrapped) if sharded() else None
    if leads():
        draw_curves(*curves_beside(run.out), run.label)
        _save(trainer.model, run, gathered)
        shutil.rmtree(work)
    accelerator.wait_for_everyone()


def _save(model: Any, run: Training, gathered: dict[str, Tensor] | None) -> None:
    """Write a trained model, or the weights that were gathered from its shards, in the dtype of the base."""
    base = Checkpoint.open(run.model)
    with whole_directory(run.out, over=_OVER, holds=_HOLDS, beside=[run.model]) as partial:
        if gathered is None:
            model.to(base.dtype).save_pretrained(partial)
        else:
            model.config.dtype = base.dtype
            model.save_pretrained(partial, state_dict={name: one.to(base.dtype) for name, one in gathered.items()})
        if not isinstance(model, peft.PeftModel):
            copy_companions(base, partial)
        if run.added_tokens:
            _with_tokens(load_tokenizer(run.model), run.added_tokens).save_pretrained(partial)
            config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
            config.get_text_config().vocab_size = _embedded(model)
            config.save_pretrained(partial)


def _last_whole_checkpoint(work: Path) -> str | None:
    """Return the newest trainer checkpoint that was finished; the trainer writes its state last."""
    numbered = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(numbered):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            if leads():
                shutil.rmtree(path, ignore_errors=True)
    return None
