"""Switching: packs that are merged into a live model give their place to others, which the shelf may have decoded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from graftllm.fusion.decoding import decode, touched_bytes
from graftllm.fusion.grafting import write_over
from graftllm.fusion.grafts import Graft
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.stacks import Mix
from graftllm.skillpack import SkillPack


class Switch:
    """A live model and the packs that are merged into it now. One thread at a time.

    Attributes:
        mix: these packs with their weights; empty when the model is the bare base, None where a change failed.
    """

    def __init__(self, model: PreTrainedModel, packs: Mapping[str, SkillPack], shelf: Shelf) -> None:
        """Start with the bare base.

        Args:
            model: a live base without packs.
            packs: by name; a name may come to mean another pack's file only where `shelf` keeps nothing under it.
            shelf: where merged weights are kept.
        """
        self.model, self.packs, self.shelf = model, packs, shelf
        self.mix: Mix | None = ()
        self._graft = Graft(model)  # for good: what could not be given back once still can be
        self._checked: set[str] = set()
        self._blocks: list[_Block] = []

    @contextmanager
    def during(self, mix: Mix) -> Iterator[None]:
        """Have packs merged for a `with` block; blocks may end in any order. Errors are those of `to`.

        When one ends the model is what it was before, or goes on with what a later block that is still open began.
        """
        block = _Block(self.mix or ())
        self._blocks.append(block)
        try:
            self.to(mix)
            yield
        finally:
            later = self._blocks[self._blocks.index(block) + 1 :]
            self._blocks.remove(block)
            if later:
                later[0].before = block.before
            else:
                self.to(block.before)

    def to(self, mix: Mix) -> None:
        """Put packs in the place of those that are merged.

        Of what is hot on the shelf that costs nothing; what the shelf has no room for is written over the base's
        weights, as `write_over` does.

        Raises:
            FusionError: the model cannot take them; see `plug`. It is the bare base then.
            PackError: a pack is damaged or was made for another base, as above.
            CheckpointError, FusionError: what was written over is not in the base's files any more, so the model is
                what it was, in part; it is asked for again with the next packs.
        """
        if mix == self.mix:
            return
        self.mix = None
        if mix:
            self._put(mix)
        else:
            self._graft.unplug()
        self.mix = mix

    def _put(self, mix: Mix) -> None:
        packs, names = [(self.packs[name], weight) for name, weight in mix], {name for name, _ in mix}
        check = not names <= self._checked
        first = next(self.model.parameters())
        key = "merged", mix, first.dtype, first.device  # a model may be moved
        size = 0 if self.shelf.has(key) else touched_bytes(self.model, packs).total()
        if size > self.shelf.limit_bytes:
            write_over(self._graft, packs, check=check)
        else:
            self._graft.unplug()
            made = partial(decode, self.model, *packs, check=check, empty=self.shelf.empty)
            self._graft.put(self.shelf.get(key, made, size).values)
        self._checked |= names


@dataclass(eq=False)
class _Block:
    """A block that was not left yet, and what was merged before."""

    before: Mix
