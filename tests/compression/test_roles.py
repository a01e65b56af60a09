import re
from pathlib import Path

import pytest

from graftllm.checkpoint import Checkpoint
from graftllm.compression.roles import Role, role_of
from tests.architectures import CONFIGS, save_base

# Names below their layer, or below the model where they are in none; `#` is any number.
ROLES: dict[Role, str] = {
    "embedding": """
        model.embed_tokens.weight model.decoder.embed_tokens.weight model.decoder.embed_positions.weight
        backbone.embeddings.weight transformer.wte.weight transformer.wpe.weight shared.weight
        bert.embeddings.word_embeddings.weight bert.embeddings.position_embeddings.weight
        bert.embeddings.token_type_embeddings.weight vit.embeddings.cls_token vit.embeddings.position_embeddings
        vit.embeddings.patch_embeddings.projection.weight""",
    "head": "lm_head.weight classifier.weight cls.predictions.transform.dense.weight",
    "attention": """
        self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight self_attn.sinks
        self_attn.out_proj.weight
        attn.c_attn.weight attn.c_proj.weight
        attention.self.query.weight attention.self.key.weight attention.self.value.weight attention.output.dense.weight
        attention.attention.query.weight attention.attention.key.weight attention.attention.value.weight
        SelfAttention.q.weight SelfAttention.k.weight SelfAttention.v.weight SelfAttention.o.weight
        SelfAttention.relative_attention_bias.weight
        EncDecAttention.q.weight EncDecAttention.k.weight EncDecAttention.v.weight EncDecAttention.o.weight
        mixer.conv#d.weight mixer.in_proj.weight mixer.out_proj.weight mixer.x_proj.weight mixer.dt_proj.weight
        mamba.conv#d.weight mamba.in_proj.weight mamba.out_proj.weight""",
    "mlp": """
        mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight mlp.c_fc.weight mlp.c_proj.weight
        fc#.weight mlp.gate.weight mlp.router.weight block_sparse_moe.gate.weight
        feed_forward.gate_proj.weight feed_forward.up_proj.weight feed_forward.down_proj.weight
        feed_forward.router.weight DenseReluDense.wi.weight DenseReluDense.wo.weight
        intermediate.dense.weight output.dense.weight""",
    "expert": """
        mlp.experts.#.gate_proj.weight mlp.experts.#.up_proj.weight mlp.experts.#.down_proj.weight
        block_sparse_moe.experts.#.w#.weight mlp.experts.gate_up_proj mlp.experts.down_proj
        feed_forward.experts.gate_up_proj feed_forward.experts.down_proj feed_forward.shared_expert.gate_proj.weight
        feed_forward.shared_expert.up_proj.weight feed_forward.shared_expert.down_proj.weight""",
    "norm": """
        input_layernorm.weight post_attention_layernorm.weight pre_feedforward_layernorm.weight
        post_feedforward_layernorm.weight pre_ff_layernorm.weight self_attn.q_norm.weight self_attn.k_norm.weight
        final_layer_norm.weight self_attn_layer_norm.weight model.decoder.final_layer_norm.weight
        mamba.norm.weight norm.weight layer_norm.weight ln_#.weight layernorm_before.weight layernorm_after.weight
        attention.output.LayerNorm.weight output.LayerNorm.weight
        model.norm.weight model.final_layernorm.weight backbone.norm_f.weight transformer.ln_f.weight
        encoder.final_layer_norm.weight decoder.final_layer_norm.weight vit.layernorm.weight
        bert.embeddings.LayerNorm.weight cls.predictions.transform.LayerNorm.weight""",
    "other": "mixer.A_log mixer.D mamba.A_log mamba.D",
}
EXPECTED = {name: role for role, names in ROLES.items() for name in names.split()}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_parameter_has_its_role(architecture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_base(architecture, tmp_path / architecture))
    for name, spec in checkpoint.specs.items():
        below = re.sub(r"^.*?(layers|layer|block|h)\.\d+\.(layer\.\d+\.)?", "", name)
        expected = "bias" if name.endswith(("bias", "dt_bias")) else EXPECTED[re.sub(r"\d+", "#", below)]
        assert role_of(name, spec.shape) == expected, name


def test_a_name_that_says_nothing_falls_back_to_the_shape() -> None:
    assert role_of("blob", (3, 4)) == "other"
    assert role_of("blob", (3, 4, 5)) == "other"
    assert role_of("blob", (3,)) == "norm"
    assert role_of("blob", ()) == "norm"


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("layers.0.attention.wo.weight", (8, 8), "attention"),
        ("layers.0.feed_forward.w2.weight", (8, 8), "mlp"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (8, 8), "expert"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 8), "bias"),
        ("backbone.layers.0.mixer.up_proj.weight", (8, 8), "mlp"),
        ("vit.embeddings.mask_token", (1, 1, 8), "embedding"),
        ("model.layers.0.linear_attn.in_proj_qkv.weight", (8, 8), "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", (8, 8), "mlp"),
        ("swin.layers.0.attention.relative_position_bias_table", (49, 3), "attention"),
    ],
)
def test_names_of_other_families_have_their_roles(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert role_of(name, shape) == role
