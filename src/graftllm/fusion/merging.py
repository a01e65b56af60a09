"""Several packs -> one set of weights, written as an ordinary checkpoint.

theta = theta_base + sum_i w_i * delta_i, one parameter in memory at a time.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from graftllm.checkpoint import DTYPES, Checkpoint, write_checkpoint
from graftllm.fusion.grafting import Weighted, agreed_spec, combined
from graftllm.progress import progress


def apply_packs(base: Checkpoint, packs: Sequence[Weighted], out: str | Path) -> None:
    """Write base + weighted packs as a checkpoint, with the base's config, tokenizer and shards.

    Where the tuned models had more vocabulary rows or another dtype, the checkpoint has them too. The
    tokenizer stays the base's; a pack's header says whether the tuned one was another.
    One exact pack of weight 1 gives the tuned checkpoint's weights bit for bit.

    Raises:
        FusionError: the packs' tuned models differ in vocabulary or dtype.
        PackError: a pack is damaged or was made for another base; nothing is then written.
        StorageError: there is no room, or the place cannot be written.
    """
    for pack, _ in packs:
        pack.check_base(base)
    specs = {name: agreed_spec(name, packs) for name in base.specs}
    config = {key: value for pack, _ in packs for key, value in pack.header.config.items()}
    with progress("applying") as show:
        done = 0

        def tensor(name: str) -> Tensor:
            nonlocal done
            value = base.tensor(name)
            for pack, _ in packs:
                pack.check_tensor(name, value)
            show(done := done + 1, len(base.specs))
            return combined(name, value, packs, dtype=DTYPES[specs[name].dtype])

        write_checkpoint(base, Path(out), tensor, specs=specs, config=config)
