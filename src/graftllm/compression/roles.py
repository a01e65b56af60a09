"""Parameter -> role: what a parameter does in its model, by its name and shape alone.

No architecture is named here. Names are matched by the words that model families share; what no
word matches falls back to its shape.
"""

import re
from typing import Literal

Role = Literal["embedding", "head", "attention", "mlp", "expert", "norm", "bias", "other"]

# First match wins, so the order matters: an expert's bias is a bias, an attention norm is a norm.
_WORDS: tuple[tuple[Role, str], ...] = (
    ("bias", r"(^|\.)bias$|_bias$"),
    ("norm", r"norm|(^|[._])ln(_?\d|_f)?($|[._])"),
    ("expert", r"(^|[._])experts?([._]|$)"),
    ("head", r"^(model\.)?(lm_head|output|embed_out|score|classifier|qa_outputs)\."),
    ("embedding", r"embed|(^|\.)(wte|wpe|shared)\."),
    (
        "mlp",
        r"mlp|feed_?forward|(^|[._])(ffn?|fc\d?|[cw][123]|dense_(h_to_4h|4h_to_h)|intermediate|gate|up|down)([._]|$)",
    ),
    ("attention", r"attn|attention|mixer|(^|[._])([qkvo](_proj)?|qkv|query|key|value)([._]|$)"),
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
        shape: a vector that no word matches counts as a norm, a matrix as `other`.
    """
    for role, words in _WORDS:
        if re.search(words, name):
            # Word tables and such can be called norms or biases only when they are vectors.
            if role in ("norm", "bias") and len(shape) > 1:
                continue
            return role
    return "norm" if len(shape) < 2 else "other"


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Return whether a parameter is a matrix that a low rank can approximate (both sides above 1)."""
    return len(shape) == 2 and min(shape) > 1
