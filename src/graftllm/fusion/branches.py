"""A pack as branches beside a live model's weights: what it adds to each module, in factors where it has them.

Nothing is approximated. A matrix of a linear layer needs the two factors whose product is its delta;
a vocabulary matrix may also be whole, to be looked up for an embedding and multiplied for a head;
vectors (norms, biases) are differences. What is stored otherwise can only be merged, and is refused here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftllm.errors import FusionError
from graftllm.fusion.decoding import check_whole, is_quantized, touched_bindings, touched_names
from graftllm.fusion.origin import Origin
from graftllm.fusion.shelf import Shelf
from graftllm.live import Binding, looks_up_its_input, named_values
from graftllm.skillpack import SkillPack

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Branch:
    """What one pack adds to one module, on CPU.

    Attributes:
        weight: the delta of a linear layer's or an embedding's weight: factors of shapes (rows, rank) and
            (rank, columns), or all of it; rows are outputs of a linear layer, tokens of an embedding.
        vectors: the delta of each parameter that is a vector, float32, by the parameter's own name.
    """

    weight: Factors | Tensor | None
    vectors: Mapping[str, Tensor]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that it holds."""
        yield from self.weight if isinstance(self.weight, tuple) else () if self.weight is None else (self.weight,)
        yield from self.vectors.values()


@dataclass(frozen=True)
class Branches:
    """What one pack adds to a live model, by the name of the module."""

    modules: Mapping[str, Branch]
    pack: SkillPack

    @property
    def nbytes(self) -> int:
        """How much memory they take, in bytes; the delta of a tied embedding counts once."""
        tensors = {one.data_ptr(): one for branch in self.modules.values() for one in branch.tensors()}
        return sum(one.nbytes for one in tensors.values())


def why_merged_only(model: nn.Module, pack: SkillPack) -> str | None:
    """Return in one line why a pack can only be merged into a model, and what to do; None if it can run beside it.

    Reads no payload.
    """
    try:
        _places(model, pack)
    except FusionError as error:
        return str(error)
    return None


def kept_branches(shelf: Shelf, name: str, model: nn.Module, pack: SkillPack, *, check: bool) -> Branches:
    """Return what `decode_branches` does, decoded unless the shelf has it, of this very pack, under a name."""
    key = ("beside", name)
    found = shelf.get(key, lambda: decode_branches(model, pack, check=check))
    if found.pack is pack:
        return found
    shelf.drop(key)
    return shelf.get(key, lambda: decode_branches(model, pack, check=check))


@torch.inference_mode(False)  # what is kept must do in any mode
@torch.no_grad()
def decode_branches(model: nn.Module, pack: SkillPack, *, check: bool = True) -> Branches:
    """Return what a pack adds beside the weights of a live model.

    Args:
        model: a causal language model of the pack's base, without packs in its weights.
        pack: one whose linear layers are stored as factors.
        check: compare every touched base weight that is not quantized with the pack's digest first.

    Raises:
        FusionError: the pack can only be merged, or the model lacks a parameter that it touches.
        PackError: the pack is damaged or was made for another base.
    """
    values, origin = named_values(model), Origin(model)
    found: dict[str, Branch] = {}
    for name, (binding, owners) in _places(model, pack).items():
        live = values[binding.live[0]]
        if check and not is_quantized(live):
            check_whole(binding.live[0], live, pack, binding)
            pack.check_tensor(name, origin.stored(name, live.detach().cpu(), pack))
        if live.dim() == 1:
            check_whole(binding.live[0], live, pack, binding)
            delta = pack.delta(name, origin.stored(name, live.detach().cpu(), pack))
            for module_name, _, key in owners:
                branch = found.get(module_name, Branch(None, {}))
                found[module_name] = Branch(branch.weight, {**branch.vectors, key: delta})
            continue
        weight = _factors(name, pack, _dtype(model, live))
        if weight is None:
            check_whole(binding.live[0], live, pack, binding)
            weight = pack.delta(name, origin.stored(name, live.detach().cpu(), pack)).to(live.dtype)
        for module_name, module, _ in owners:
            vectors = found[module_name].vectors if module_name in found else {}
            found[module_name] = Branch(_transposed(weight) if isinstance(module, Conv1D) else weight, vectors)
    return Branches(found, pack)


_Owner = tuple[str, nn.Module, str]  # a module's name, the module, and its own name of a parameter


def _places(model: nn.Module, pack: SkillPack) -> dict[str, tuple[Binding, list[_Owner]]]:
    """Return for each parameter that the pack touches the modules that use it, or refuse the pack."""
    if (
        not isinstance(model, PreTrainedModel)
        or not model.can_generate()
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        raise FusionError(
            f"{pack.source}: {type(model).__name__} is no language model that only continues its input, so packs "
            "cannot run beside its weights. Use this pack merged, one pack for a batch."
        )
    owners: dict[int, list[_Owner]] = {}
    for module_name, module in model.named_modules():
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            owners.setdefault(id(value), []).append((module_name, module, key))
    values = named_values(model)
    bindings = {name: binding for binding in touched_bindings(model, [(pack, 1.0)]) for name in binding.stored}
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    found: dict[str, tuple[Binding, list[_Owner]]] = {}
    for name in touched_names(pack):
        here = owners.get(id(values[bindings[name].live[0]]), [])
        if not bindings[name].plain or not here:
            raise _only_merged(name, pack, "which transformers keeps in another form, as it does stacked experts")
        for _, module, key in here:
            _check_place(name, pack, module, key, whole=module in vocabulary or isinstance(module, nn.Embedding))
        found[name] = bindings[name], here
    return found


def _check_place(name: str, pack: SkillPack, module: nn.Module, key: str, *, whole: bool) -> None:
    """Refuse a parameter that no branch can stand for; a vocabulary's may be stored `whole`, in any way."""
    entry = pack.header.tensors[name]
    if entry.tuned_spec.shape != entry.shape:
        raise _only_merged(name, pack, "to which it adds vocabulary rows")
    if entry.tuned_spec != entry.spec:
        raise _only_merged(name, pack, "whose tuned model has another dtype")
    if len(entry.shape) == 1 and not any(True for _ in module.children()):
        return
    if isinstance(module, nn.Embedding) and not looks_up_its_input(module):
        raise _only_merged(name, pack, f"of {type(module).__name__}, which looks up by more than its input")
    if key != "weight" or not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or _has_own_way(module):
        raise _only_merged(name, pack, f"a parameter of {type(module).__name__}")
    if not whole and entry.operator not in ("factored", "lowrank"):
        raise FusionError(
            f"{pack.source}: stores {name!r} by the operator {entry.operator!r}, not in factors, so it can only be "
            "merged. Rebuild it with `graftllm pack --servable RANK`, or use it merged, one pack for a batch."
        )


def _has_own_way(module: nn.Module) -> bool:
    """Return whether a model's code has made a linear layer of its own, such as a router that flattens its rows."""
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.models.")
        and issubclass(kind, nn.Linear)
        and kind.forward is not nn.Linear.forward
    )


def _only_merged(name: str, pack: SkillPack, what: str) -> FusionError:
    return FusionError(
        f"{pack.source}: touches {name!r}, {what}; this cannot run beside the weights. "
        "Use this pack merged, one pack for a batch."
    )


def _factors(name: str, pack: SkillPack, dtype: torch.dtype) -> Factors | None:
    factors = pack.factors(name)
    return None if factors is None else (factors[0].to(dtype).contiguous(), factors[1].to(dtype).contiguous())


def _transposed(weight: Factors | Tensor) -> Factors | Tensor:
    """Return the delta of a weight that is stored as (inputs, outputs) with outputs as rows."""
    return (weight[1].T, weight[0].T) if isinstance(weight, tuple) else weight.T


def _dtype(model: PreTrainedModel | nn.Module, live: Tensor) -> torch.dtype:
    """Return the dtype to multiply factors in: the weight's, or of a quantized one the model's."""
    return live.dtype if not is_quantized(live) else getattr(model, "dtype", torch.float32)
