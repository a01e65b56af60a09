"""The delta (task vector): tuned minus base, one parameter at a time, never a whole model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError


@dataclass(frozen=True)
class Delta(Mapping[str, Tensor]):
    """A lazy mapping from parameter name to tuned - base in float32.

    Raises:
        CheckpointError: at construction, when the two do not have the same parameters, shapes and dtypes.
    """

    base: Checkpoint
    tuned: Checkpoint

    def __post_init__(self) -> None:
        for name in [*self.base.specs, *self.tuned.specs]:
            self._check(name)

    def __getitem__(self, name: str) -> Tensor:
        """Return tuned - base in float32.

        Raises:
            CheckpointError: the difference holds NaN or infinity.
        """
        base, tuned = self.pair(name)
        return difference(base, tuned, where=f"{self.tuned.path}: tensor {name!r}")

    def __iter__(self) -> Iterator[str]:
        """Yield the names, `layers.2` before `layers.10`."""
        return iter(self.base.specs)

    def __len__(self) -> int:
        """Return how many parameters the checkpoints have."""
        return len(self.base.specs)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the base and the tuned value in their stored dtype."""
        return self.base.tensor(name), self.tuned.tensor(name)

    def _check(self, name: str) -> None:
        base, tuned = self.base.specs.get(name), self.tuned.specs.get(name)
        if base is None or tuned is None:
            lacking, having = (self.base, self.tuned) if base is None else (self.tuned, self.base)
            if any(word in name for word in ("lm_head", "embed_out", "output_layer")):
                raise CheckpointError(
                    f"{lacking.path}: ties the output head to its embedding, but {having.path} has its own, {name!r}. "
                    "A delta needs both tied or both untied; save both with the same tie_word_embeddings."
                )
            raise CheckpointError(
                f"{lacking.path}: has no tensor {name!r}, which {having.path} has. "
                "A delta needs the same parameters on both sides; check that one was trained from the other."
            )
        if base.shape != tuned.shape:
            vocabulary = len(base.shape) == 2 and base.shape[1:] == tuned.shape[1:] and _is_vocabulary(name)
            mend = (
                "Their vocabularies differ; resize the base's embedding to match, or train without added tokens."
                if vocabulary
                else "They are not the same architecture; check that one was trained from the other."
            )
            raise CheckpointError(
                f"{self.tuned.path}: tensor {name!r} has shape {list(tuned.shape)}, "
                f"but {self.base.path} has {list(base.shape)}. {mend}"
            )
        if base.dtype != tuned.dtype:
            raise CheckpointError(
                f"{self.tuned.path}: tensor {name!r} is {tuned.dtype}, but {self.base.path} has {base.dtype}. "
                "Save both in the same dtype."
            )


def difference(base: Tensor, tuned: Tensor, *, where: str) -> Tensor:
    """Return tuned - base in float32.

    Raises:
        CheckpointError: it holds NaN or infinity; the message begins with `where`.
    """
    delta = tuned.float() - base.float()
    if not bool(torch.isfinite(delta).all()):
        count = int((~torch.isfinite(delta)).sum())
        raise CheckpointError(
            f"{where}: {count} of {delta.numel()} differences to the base are NaN or infinite. "
            "The training diverged or a file is damaged; pack an earlier checkpoint."
        )
    return delta


def _is_vocabulary(name: str) -> bool:
    return any(word in name for word in ("embed", "lm_head", "wte", "shared"))
