"""Switching: packs that are merged into a live model give their place to others, which the shelf may have decoded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from graftllm.fusion.grafting import write_over
from graftllm.fusion.grafts import Graft
from graftllm.fusion.shelf import Shelf, kept_replacement, may_be_kept
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
        packs = [(self.packs[name], weight) for name, weight in mix]
        names = {name for name, _ in mix}
        check = not names <= self._checked
        if mix and not may_be_kept(self.shelf, mix, self.model, packs):
            write_over(self._graft, packs, check=check)
        else:
            self._graft.unplug()
            if mix:
                self._graft.put(kept_replacement(self.shelf, mix, self.model, packs, check=check).values)
        self._checked |= names
        self.mix = mix


@dataclass(eq=False)
class _Block:
    """A block that was not left yet, and what was merged before."""

    before: Mix
