"""GraftLLM: move a capability from any LLM into yours, and keep it as a small SkillPack.

The names below are the whole public face; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftllm.callback import SkillPackCallback
    from graftllm.checkpoint import Checkpoint
    from graftllm.delta import Delta
    from graftllm.errors import GraftError
    from graftllm.evaluation.fidelity import measure_fidelity
    from graftllm.fusion.applying import apply_packs
    from graftllm.fusion.grafted import GraftedModel
    from graftllm.fusion.grafting import plug
    from graftllm.packer import compress
    from graftllm.packing_options import PackOptions
    from graftllm.records import Prompt, read_prompts
    from graftllm.skillpack import SkillPack
    from graftllm.transfer_options import SamplingOptions

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Delta",
    "GraftError",
    "GraftedModel",
    "PackOptions",
    "Prompt",
    "SamplingOptions",
    "SkillPack",
    "SkillPackCallback",
    "apply_packs",
    "compress",
    "measure_fidelity",
    "plug",
    "read_prompts",
]

_ROOMS = {
    "Checkpoint": "checkpoint",
    "Delta": "delta",
    "GraftError": "errors",
    "GraftedModel": "fusion.grafted",
    "PackOptions": "packing_options",
    "Prompt": "records",
    "SamplingOptions": "transfer_options",
    "SkillPack": "skillpack",
    "SkillPackCallback": "callback",
    "apply_packs": "fusion.applying",
    "compress": "packer",
    "measure_fidelity": "evaluation.fidelity",
    "plug": "fusion.grafting",
    "read_prompts": "records",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `graftllm --help` does not wait for PyTorch."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    """Name the public face to shells that complete names, and to `help`, before any of it is imported."""
    return sorted({*globals(), *__all__})
