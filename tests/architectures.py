"""Tiny models of many architectures, built on the spot with random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BambaConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
)

from graftllm.checkpoint import Checkpoint, copy_companions
from tests.models import tokenizer

_WORDS = len(tokenizer())
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
_DECODER: dict[str, Any] = {
    "vocab_size": _WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.2, **_SPECIAL,
}  # fmt: skip
_UNTIED = _DECODER | {"tie_word_embeddings": False}

CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_UNTIED),
    "qwen2": Qwen2Config(**_UNTIED),
    "qwen3": Qwen3Config(**_UNTIED),
    "gemma2": Gemma2Config(**_DECODER),
    "gemma3": Gemma3TextConfig(**_DECODER),
    "mistral": MistralConfig(**_UNTIED),
    "gpt2": GPT2Config(
        vocab_size=_WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2, **_SPECIAL
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_UNTIED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
    "mixtral": MixtralConfig(**_UNTIED, num_local_experts=4),
    "opt": OPTConfig(
        vocab_size=_WORDS, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, word_embed_proj_dim=16, init_std=0.2, **_SPECIAL
    ),
    "phimoe": PhimoeConfig(**_UNTIED, num_local_experts=4),
    "gpt_oss": GptOssConfig(**_UNTIED, num_local_experts=4, num_experts_per_tok=2),
    "llama4": Llama4TextConfig(
        **_UNTIED, intermediate_size_mlp=24, num_local_experts=4, interleave_moe_layer_step=2, no_rope_layer_interval=2,
        attention_chunk_size=16,
    ),
    "mamba": MambaConfig(vocab_size=_WORDS, hidden_size=16, num_hidden_layers=2, state_size=4, **_SPECIAL),
    "bamba": BambaConfig(
        **_UNTIED, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, attn_layer_indices=[1]
    ),
    "t5": T5Config(
        vocab_size=_WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **_SPECIAL
    ),
    "bert": BertConfig(
        vocab_size=_WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **_SPECIAL
    ),
    "vit": ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    ),
}  # fmt: skip
_AUTO: Mapping[str, Any] = {
    "t5": AutoModelForSeq2SeqLM,
    "bert": AutoModelForMaskedLM,
    "vit": AutoModelForImageClassification,
}


def save_base(name: str, path: Path, *, dtype: torch.dtype = torch.bfloat16, kind: Any = None) -> Path:
    """Save a model of one architecture, with its tokenizer; `kind` is another auto class than the usual one."""
    torch.manual_seed(0)
    model = (kind or _AUTO.get(name, AutoModelForCausalLM)).from_config(CONFIGS[name])
    for value in model.parameters():  # some are made as zeros or ones, which hide mistakes
        value.data += 0.1 * torch.randn_like(value)
    model.to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def save_tuned(base: Path, out: Path) -> Path:
    """Save a copy of a checkpoint, all of whose floating-point numbers are others."""
    draw = torch.Generator().manual_seed(1)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=draw)
            tensors[name] = (value.float() * (1 + 0.05 * noise) + 0.01 * noise).to(value.dtype)
    out.mkdir(parents=True)
    copy_companions(Checkpoint.open(base), out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def load(name: str, path: Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a saved model of one architecture."""
    return _AUTO.get(name, AutoModelForCausalLM).from_pretrained(path, dtype=dtype).eval()


def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Run a model on something that it reads, and return what it says."""
    inputs: dict[str, Any] = {model.main_input_name: torch.arange(4, 20)[None]}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).to(model.dtype)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        return model(**inputs).logits.float()
