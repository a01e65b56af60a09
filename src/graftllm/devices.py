"""Which device the work is done on."""

import torch

from graftllm.errors import CheckpointError, first_line


def resolve_device(device: str) -> torch.device:
    """Return the device that `auto` stands for (a GPU when there is one), or the named one.

    Raises:
        CheckpointError: PyTorch does not know the device or cannot reach it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.zeros(1, device=device)
        found.item()  # a device without values, such as meta, will not do
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown, not built in, without values
        raise CheckpointError(
            f"device: expected auto, cpu or a device that PyTorch sees here, found {device!r} ({first_line(error)})."
        ) from error
