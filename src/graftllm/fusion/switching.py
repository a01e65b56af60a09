"""Switching: packs that are merged into a live model give their place to others, which the shelf may have decoded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from graftllm.fusion.grafting import Graft
from graftllm.fusion.shelf import Shelf, kept_replacement
from graftllm.fusion.stacks import Mix
from graftllm.skillpack import SkillPack


class Switch:
    """A live model and the packs that are merged into it now. One thread at a time.

    Attributes:
        mix: these packs with their weights; empty when the model is the bare base.
    """

    def __init__(self, model: PreTrainedModel, packs: Mapping[str, SkillPack], shelf: Shelf) -> None:
        """Start with the bare base.

        Args:
            model: a live base without packs.
            packs: by name; a name may come to mean another pack's file only where `shelf` keeps nothing under it.
            shelf: where merged weights are kept.
        """
        self.model, self.packs, self.shelf = model, packs, shelf
        self.mix: Mix = ()
        self._graft = Graft(model, {})
        self._checked: set[str] = set()
        self._blocks: list[_Block] = []

    @contextmanager
    def during(self, mix: Mix) -> Iterator[None]:
        """Have packs merged for a `with` block; blocks may end in any order. Errors are those of `to`.

        When one ends the model is what it was before, or goes on with what a later block that is still open began.
        """
        block = _Block(self.mix)
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
        """Put packs in the place of those that are merged; of what is hot on the shelf that costs nothing.

        Raises:
            FusionError: the model cannot take them; see `plug`. It is the bare base then.
            PackError: a pack is damaged or was made for another base, as above.
        """
        if mix == self.mix:
            return
        self._graft.unplug()
        self.mix = ()
        if mix:
            packs = [(self.packs[name], weight) for name, weight in mix]
            names = {name for name, _ in mix}
            merged = kept_replacement(self.shelf, mix, self.model, packs, check=not names <= self._checked)
            self._checked |= names
            self._graft, self.mix = merged.plug(self.model), mix


@dataclass(eq=False)
class _Block:
    """A block that was not left yet, and what was merged before."""

    before: Mix
