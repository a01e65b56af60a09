"""Parameter -> role: what a parameter does in its model, by its name and shape alone.

No architecture is named here. Names are matched by the words that model families share; what no
word matches falls back to its shape.
"""

import re
from typing import Literal

Role = Literal["embedding", "head", "attention", "mlp", "expert", "norm", "bias", "other"]

# First match wins, so the order matters: an expert's bias is a bias, an attention norm is a norm.
# State-space and other token mixers count as attention: they are what stands in its place.
_WORDS: tuple[tuple[Role, str], ...] = (
    ("bias", r"(^|\.)bias$|_bias$"),
    ("norm", r"[Nn]orm|(^|[._])ln(_?\d|_f)?($|[._])"),
    ("expert", r"(^|[._])experts?([._]|$)"),
    ("head", r"^((language_)?model\.)?(lm_head|head|output|embed_out|score|classifier|qa_outputs|cls|vocab_\w+)\."),
    ("embedding", r"embed|(^|\.)(wte|wpe|shared)\.|_tokens?$"),
    ("attention", r"attn|[Aa]ttention"),
    ("other", r"(^|\.)(A_log|A|D)$"),
    (
        "mlp",
        r"mlp|feed_?forward|router|(^|\.)output\.dense\.|"
        r"(^|[._])(ffn?|fc\d?|[cw][123]|w[io](_\d)?|dense_(h_to_4h|4h_to_h)|intermediate|gate|up|down)([._]|$)",
    ),
    (
        "attention",
        r"mixer|mamba|ssm|time_mix|conv1d|"
        r"(^|[._])([qkvo](_proj)?|qkv|query|key|value|(in|out|x|dt)_proj)([._]|$)",
    ),
)


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Return the role of a parameter.

    >>> role_of("model.layers.0.self_attn.q_proj.weight", (128, 128))
    'attention'
    >>> role_of("model.layers.0.self_attn.q_norm.weight", (32,))
    'norm'
    >>> role_of("transformer.h.0.mlp.c_fc.weight", (128, 512))
    'mlp'
    >>> role_of("something.weight", (1000, 8)), role_of("something.scale", (8,))
    ('other', 'norm')

    Args:
        name: as in the checkpoint, such as `model.layers.0.mlp.up_proj.weight`.
        shape: a vector that no word matches counts as a norm, anything else as `other`.
    """
    if len(shape) == 3 and "moe" in name:  # a stack, whatever its own name is
        return "expert"
    for role, words in _WORDS:
        if re.search(words, name):
            if role == "norm" and len(shape) > 1:  # a table or projection beside one
                continue
            return role
    return "norm" if len(shape) < 2 else "other"
