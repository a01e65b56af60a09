"""What a served model's weights are at a moment: the base with packs beside it, row by row, or packs merged.

Packs are known by the SHA-256 of their files, so that a name may come to mean another file while
rows that began with the old one go on. Decoded packs stay within a memory limit, those used last.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from graftllm.fusion.beside import Beside, Mix
from graftllm.fusion.branches import kept_branches, why_merged_only
from graftllm.fusion.shelf import Shelf
from graftllm.fusion.switching import Switch
from graftllm.skillpack import SkillPack


class Weights:
    """A live model whose rows have packs. One thread."""

    def __init__(self, model: PreTrainedModel, memory_bytes: int) -> None:
        """Start with the bare base.

        Args:
            model: a live base without packs.
            memory_bytes: how much of decoded packs is kept, and how much may be in use in one batch.
        """
        self.model = model
        self.shelf = Shelf(memory_bytes)
        self.packs: dict[str, SkillPack] = {}
        self._merged_only: dict[str, str | None] = {}
        self._checked: set[str] = set()
        self._switch = Switch(model, self.packs, self.shelf)
        # Prompts are often of one pack while the running batch has many: with one stack for both, each would
        # undo what the other stacked.
        self._reading, self._writing = (Beside(model, self.packs, self.shelf) for _ in range(2))

    def only(self, packs: Mapping[str, SkillPack]) -> None:
        """Know these packs, by digest, and no others; what is decoded of a file that stays where it is stays, too."""
        known = {digest: pack for digest, pack in self.packs.items() if digest in packs}
        self.packs.clear()
        for digest, pack in packs.items():
            same = digest in known and known[digest].source == pack.source
            self.packs[digest] = known[digest] if same else pack

    def runs_beside(self, mix: Mix) -> bool:
        """Return whether all packs of a mix can run beside the weights."""
        for digest, _ in mix:
            if digest not in self._merged_only:
                self._merged_only[digest] = why_merged_only(self.model, self.packs[digest])
        return all(self._merged_only[digest] is None for digest, _ in mix)

    def fits(self, mixes: Sequence[Mix]) -> bool:
        """Return whether all packs of these mixes may be in use beside the weights at once; decodes them if need be.

        Raises:
            PackError: a pack is damaged or was made for another base.
        """
        digests = {digest for mix in mixes for digest, _ in mix}
        return sum(map(self._load, digests)) <= self.shelf.limit_bytes

    @contextmanager
    def beside(self, mixes: Sequence[Mix], *, reading: bool) -> Iterator[None]:
        """Let each row of the batch that runs inside the block have its packs; `reading` is for prompts."""
        self._switch.to(())
        with (self._reading if reading else self._writing).rows([dict(mix) for mix in mixes]):
            yield

    def merge(self, mix: Mix) -> None:
        """Put packs into the weights, until others or none are asked for.

        Raises:
            PackError: a pack is damaged or was made for another base.
        """
        self._switch.to(mix)

    def bare(self) -> None:
        """Take merged packs out again."""
        self._switch.to(())

    def _load(self, digest: str) -> int:
        """Decode a pack that is to run beside the weights, and return its size."""
        self._switch.to(())
        check = digest not in self._checked
        size = kept_branches(self.shelf, digest, self.model, self.packs[digest], check=check).nbytes
        self._checked.add(digest)
        return size
