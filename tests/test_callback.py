from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from graftllm import SkillPackCallback
from graftllm.callback import PACK
from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError, TrainingError
from graftllm.loading import load_tokenizer
from graftllm.packing_options import PackOptions
from graftllm.skillpack import SkillPack
from tests.models import rows, save_llama

# TRL 1.16 and PEFT 0.21 ask transformers by a name that 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class StopAt(TrainerCallback):
    """Ends a training early, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def trainer(base: Path, out: Path, *callbacks: TrainerCallback, lora: bool = False, **changes: Any) -> SFTTrainer:
    turns = [
        {"prompt": list(row.question), "completion": [{"role": "assistant", "content": row.answer}]} for row in rows(24)
    ]
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "save_strategy": "steps", "save_steps": 3, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "bf16": False, "activation_checkpointing": False, "max_length": 64, "dataloader_pin_memory": False,
    }  # fmt: skip
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(**settings | changes),
        train_dataset=Dataset.from_list(turns),
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
        callbacks=list(callbacks),
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_training_that_goes_on_from_a_pack_ends_with_the_same_bits(base_dir: Path, tmp_path: Path) -> None:
    straight = trainer(base_dir, tmp_path / "straight")
    straight.train()
    callback = SkillPackCallback(base_dir)
    trainer(base_dir, tmp_path / "run", callback, StopAt(3)).train()
    saved = tmp_path / "run" / "checkpoint-3"
    assert not list(saved.glob("model*.safetensors*"))
    expected = load_file(tmp_path / "straight" / "checkpoint-3" / "model.safetensors")
    pack, base = SkillPack.load(saved / PACK), Checkpoint.open(base_dir)
    for name, value in expected.items():
        assert torch.equal(pack.restore(name, base.tensor(name)), value)
    assert pack.header.card.name == "checkpoint-3"
    again = trainer(base_dir, tmp_path / "run", callback)
    again.train(resume_from_checkpoint=callback.resume_from(tmp_path / "run"))
    assert again.state.global_step == 6
    ended, other = weights(straight.model), weights(again.model)
    assert all(torch.equal(ended[name], other[name]) for name in ended)
    assert (tmp_path / "run" / "checkpoint-6" / PACK).exists()


def test_without_a_checkpoint_training_starts_anew(base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()  # killed before the trainer's state was written
    assert SkillPackCallback(base_dir).resume_from(tmp_path) is None
    assert SkillPackCallback(base_dir).resume_from(tmp_path / "none") is None


def test_an_adapters_checkpoint_keeps_its_files_and_gets_a_pack(base_dir: Path, tmp_path: Path) -> None:
    callback = SkillPackCallback(base_dir, PackOptions(budget="60KB"))
    trainer(base_dir, tmp_path / "run", callback, lora=True, max_steps=3).train()
    saved = tmp_path / "run" / "checkpoint-3"
    assert (saved / "adapter_model.safetensors").exists()
    assert SkillPack.load(saved / PACK).header.card.provenance.sources == (
        "the PEFT adapter checkpoint-3 (LoRA of rank 4), merged",
    )
    assert callback.resume_from(tmp_path / "run") == str(saved)


def test_a_lossy_pack_cannot_be_trained_on_from(base_dir: Path, tmp_path: Path) -> None:
    callback = SkillPackCallback(base_dir, PackOptions(budget="30KB"))
    trainer(base_dir, tmp_path / "run", callback, max_steps=3).train()
    pack = tmp_path / "run" / "checkpoint-3" / PACK
    assert pack.stat().st_size <= 30_000
    with pytest.raises(TrainingError, match="was packed with the strategy auto; training goes on from exact packs"):
        callback.resume_from(tmp_path / "run")


def test_a_trainer_that_wants_the_best_weights_back_is_refused(base_dir: Path, tmp_path: Path) -> None:
    wants_best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    refused = trainer(base_dir, tmp_path / "run", SkillPackCallback(base_dir))
    for name, value in wants_best.items():
        setattr(refused.args, name, value)
    with pytest.raises(TrainingError, match="load_best_model_at_end needs the weights of checkpoints, which become"):
        refused.train()


def test_a_model_of_another_shape_is_refused_and_keeps_its_weights(base_dir: Path, tmp_path: Path) -> None:
    trainer(base_dir, tmp_path / "run", max_steps=3).train()
    saved = tmp_path / "run" / "checkpoint-3"
    other = save_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match="They are not the same architecture"):
        SkillPackCallback(other).pack(saved)
    assert (saved / "model.safetensors").exists()
