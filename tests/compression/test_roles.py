import pytest
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from graftllm.compression.roles import role_of

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        MistralConfig(**SMALL),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL),
        Gemma2Config(**SMALL),
        MixtralConfig(**SMALL, num_local_experts=2),
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20, tie_word_embeddings=False),
    ],
    ids=lambda config: config.model_type,
)
def test_every_parameter_of_common_architectures_has_its_role(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    found = {name: role_of(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    assert "other" not in found.values()
    for name, role in found.items():
        vector = model.state_dict()[name].ndim == 1
        assert (role in ("norm", "bias")) == vector, name
        if "lm_head" in name:
            assert role == "head"
        elif "embed" in name or "wte" in name or "wpe" in name:
            assert role == "embedding"
        elif "experts" in name:
            assert role == "expert"
        elif not vector and "attn" in name:
            assert role == "attention"
        elif not vector and "mlp" in name:
            assert role == "mlp", name


def test_a_name_that_says_nothing_falls_back_to_the_shape() -> None:
    assert role_of("blob", (3, 4)) == "other"
    assert role_of("blob", (3,)) == "norm"
    assert role_of("blob", ()) == "norm"
