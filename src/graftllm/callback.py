"""SkillPackCallback: a transformers or TRL trainer keeps SkillPacks where it would keep checkpoints' weights."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from graftllm.adapters import AdaptedCheckpoint, open_tuned, origin
from graftllm.checkpoint import INDEX, Checkpoint
from graftllm.delta import Delta
from graftllm.errors import TrainingError
from graftllm.fusion.applying import apply_packs
from graftllm.header import Card, Provenance
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from graftllm.records import Prompt
from graftllm.skillpack import SkillPack
from graftllm.tensors import digest

PACK = "skillpack.safetensors"


class SkillPackCallback(TrainerCallback):
    """Keep a SkillPack of each checkpoint that a trainer saves, instead of the model's weights.

    `checkpoint-N/skillpack.safetensors` takes the place of `checkpoint-N/model.safetensors`, once it is there whole
    and, where the strategy is `exact`, was read back and gives the same bits. Everything else that the trainer keeps
    in `checkpoint-N` (optimizer, scheduler, random states, its own state) stays as the trainer wrote it. A LoRA
    adapter's own files stay, too; the pack holds it merged.
    """

    def __init__(
        self,
        base: str | Path,
        options: PackOptions = PackOptions(strategy="exact"),
        *,
        calibration: Sequence[Prompt] = (),
        device: str = "cpu",
    ) -> None:
        """Open the base that packs are made for: what the training started from.

        Args:
            base: checkpoint directory or Hub id.
            options: `exact` packs can be trained on from; smaller ones cannot.
            calibration: rows for the lossy strategies, as `compress` takes them.
            device: where matrices are decomposed.

        Raises:
            CheckpointError: the base cannot be opened.
        """
        self.base, self.options = Checkpoint.open(base), options
        self.calibration, self.device = calibration, device

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a training that will want back the weights that this callback takes away.

        Raises:
            TrainingError: `load_best_model_at_end` is set.
        """
        if args.load_best_model_at_end:
            raise TrainingError(
                "SkillPackCallback: load_best_model_at_end needs the weights of checkpoints, which become packs. "
                "Set it to False, and apply the best checkpoint's pack afterwards."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Turn the checkpoint that was just written into a pack.

        Raises:
            CheckpointError: the model is no longer the base's with other weights.
            CompressionError: the budget cannot be met.
        """
        if state.is_world_process_zero:
            self.pack(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def pack(self, directory: Path) -> SkillPack:
        """Turn one checkpoint of a trainer into a pack beside the rest of it, and return the pack."""
        tuned = open_tuned(directory, self.base)
        delta = Delta(self.base, tuned)
        card = Card(name=directory.name, provenance=Provenance(sources=origin(directory)))
        made = compress(delta, self.options, calibration=self.calibration, card=card, device=self.device)
        made.save(directory / PACK)
        pack = SkillPack.load(directory / PACK)
        if self.options.strategy == "exact":
            _check_bits(pack, delta)
        if not isinstance(tuned, AdaptedCheckpoint):
            _remove_weights(tuned)
        return pack

    def resume_from(self, output_dir: str | Path) -> str | None:
        """Give the newest checkpoint its weights back, bit for bit, and return it for `train`.

        `trainer.train(resume_from_checkpoint=callback.resume_from(args.output_dir))` then goes on as a trainer does
        from its own checkpoints: weights from the pack; optimizer, scheduler, random states and place in the data from
        the trainer's files, or afresh where `save_only_model` left them out.

        Args:
            output_dir: the trainer's.

        Returns:
            The directory; None where there is no whole checkpoint yet, which starts the training anew.

        Raises:
            TrainingError: the pack is a lossy one, which gives other weights.
            PackError: the pack is damaged or was made for another base.
        """
        numbered = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
        whole = [path for path in numbered if (path / "trainer_state.json").exists()]
        if not whole:
            return None
        last = max(whole, key=lambda path: int(path.name[11:]))
        if not list(last.glob("*model*.safetensors")):
            self._restore(last)
        return str(last)

    def _restore(self, directory: Path) -> None:
        """Write the weights that a pack stands for where the trainer looks for them."""
        pack = SkillPack.load(directory / PACK)
        if not all(entry.bit_for_bit for entry in pack.header.tensors.values()):
            raise TrainingError(
                f"{directory / PACK}: holds other weights than were trained, since it was packed with the strategy "
                f"{pack.header.options.strategy}; training goes on from exact packs alone. Start anew from the base, "
                "or from a checkpoint that `graftllm apply` makes of it."
            )
        scratch = directory / ".restored"
        try:
            apply_packs(self.base, [pack], scratch)
            for file in sorted(scratch.glob("*.safetensors*")):  # shards before their index
                os.replace(file, directory / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check_bits(pack: SkillPack, delta: Delta) -> None:
    for name in delta:
        if digest(pack.restore(name, delta.base.tensor(name))) != delta.tuned.digest(name):
            raise TrainingError(
                f"{pack.source}: gives other bits for {name!r} than the checkpoint beside it, whose weights were "
                "therefore kept. This is a bug of ours; please report it."
            )


def _remove_weights(checkpoint: Checkpoint) -> None:
    """Take away a checkpoint's shards, the index first, so that no index names what is gone."""
    (checkpoint.path / INDEX).unlink(missing_ok=True)
    for shard in set(checkpoint.shards.values()):
        (checkpoint.path / shard).unlink()
