"""A live model that does not have to fit in memory: its weights are read from disk whenever a block runs.

A block is an element of an outermost `nn.ModuleList`, which is what layers stand in, or any module
outside of those with parameters of its own. Its parameters exist, in float32, while its `forward`
runs; nothing is copied on disk. Tensors are read and named by `live`. From such a model it is told,
before anything is read, whether a checkpoint holds a language model, and whether text can run through it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from graftllm.checkpoint import Checkpoint
from graftllm.errors import CheckpointError, CompressionError, first_line
from graftllm.live import Binding, bindings, looks_up_its_input
from graftllm.loading import UNREADABLE
from graftllm.rendering import input_embedding


@dataclass(frozen=True)
class StreamedModel:
    """A model in evaluation mode whose parameters have no values between the runs of their blocks.

    A forward pass that asks for some then ends in a `WeightsAbsent`.

    Attributes:
        model: takes inputs on `device`.
        bindings: where each live parameter comes from, by all of its names: a tied head has its embedding's.
    """

    model: PreTrainedModel
    device: torch.device
    bindings: dict[str, Binding]


def stream_model(checkpoint: Checkpoint, *, device: torch.device) -> StreamedModel:
    """Return a model of the class that `config.json` names, which reads its weights from the checkpoint's files.

    Raises:
        CheckpointError: transformers does not know the class, or the checkpoint lacks a parameter.
    """
    model = _empty_model(checkpoint)
    found = _sources(model, checkpoint)
    for name, buffer in model.named_buffers():
        if name in found:
            values = found[name].to_live({stored: checkpoint.tensor(stored) for stored in found[name].stored})
            buffer.data = values[name].to(buffer.dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for places in _blocks(model):
        _Loader(checkpoint, found, places, device).attach()
    return StreamedModel(model, device, found)


def is_language_model(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint holds a head for words and everything before it, as AutoModelForCausalLM loads them.

    Classifiers and encoders without a head do not, nor do models that read one text and write another.

    Raises:
        CheckpointError: transformers does not know the class that `config.json` names.
    """
    model = _empty_model(checkpoint)
    loads = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model.config.is_encoder_decoder
    return loads and model.get_output_embeddings() is not None


def check_language_model(checkpoint: Checkpoint, *, asked: str, mend: str) -> None:
    """Refuse a model whose next tokens cannot be compared with another's, though somebody `asked` for it.

    Raises:
        CheckpointError: it is no language model; or as for `is_language_model`.
    """
    if not is_language_model(checkpoint):
        raise CheckpointError(
            f"{asked}: compares next tokens, which takes a language model, but {checkpoint.path} is a "
            f"{checkpoint.architecture}. {mend}"
        )


def check_reads_text(checkpoint: Checkpoint) -> None:
    """Refuse a model that calibration text cannot run through.

    Raises:
        CheckpointError: transformers does not know the class that `config.json` names.
        CompressionError: it reads more than one text, or its weights are quantized.
    """
    if (quantized := checkpoint.config.get("quantization_config")) is not None:
        how = quantized.get("quant_method", "quantized") if isinstance(quantized, dict) else "quantized"
        raise CompressionError(
            f"{checkpoint.path}: its weights are quantized ({how}), so calibration text cannot run through them. "
            "Load the model dequantized and save that, or pack it without calibration."
        )
    model: Any = _empty_model(checkpoint)
    reads = "one text and writes another" if model.config.is_encoder_decoder else model.main_input_name
    if reads == "input_ids" and input_embedding(model) is None:
        reads = "something else"
    elif reads == "input_ids" and hasattr(model.config, "vision_config") and model.get_output_embeddings() is None:
        reads = "pictures, too"
    if reads != "input_ids":
        raise CompressionError(
            f"{checkpoint.path}: calibration text needs a model that reads input_ids alone, but "
            f"{type(model).__name__} reads {reads}. Pack it without calibration."
        )


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    named = checkpoint.architecture
    kind = getattr(transformers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise CheckpointError(
            f"{checkpoint.path}: transformers {transformers.__version__} has no model class {named!r}, which "
            "config.json names. Upgrade transformers, or save the model with one of its classes."
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        config.get_text_config().use_cache = False
        config._experts_implementation = "eager"  # one product per expert, which can be watched
        with init_empty_weights(include_buffers=False):
            model = kind(config)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot build a {named} ({first_line(error)})."
        ) from error
    model.tie_weights()
    return model.requires_grad_(False).eval()


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Binding]:
    """Return the binding of every parameter and persistent buffer by each of its names."""
    found = {name: binding for binding in bindings(model, checkpoint.specs) for name in binding.live}
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    for tied in names.values():
        source = next((found[name] for name in tied if name in found), None)
        if source is None:
            raise CheckpointError(
                f"{checkpoint.path}: has no tensor for {tied[0]!r} of {type(model).__name__}. "
                "The checkpoint is incomplete or its config.json names another class."
            )
        found |= dict.fromkeys(tied, source)
    return found


Place = tuple[nn.Module, str, str]  # a module, its parameter's own name and its full one


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[Place]]]:
    """Yield each module that loads parameters when it runs, with those; together they cover the model."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, list[Place]]]:
        own = [(module, key, f"{path}{key}") for key, value in module._parameters.items() if value is not None]
        if own:
            yield module, own
        for key, child in module.named_children():
            if isinstance(module, nn.ModuleList):
                places = [
                    (part, name, ".".join(filter(None, (f"{path}{key}", inner, name))))
                    for inner, part in child.named_modules()
                    for name, value in part._parameters.items()
                    if value is not None
                ]
                yield child, places
            else:
                yield from walk(child, f"{path}{key}.")

    return walk(model, "")


class _Loader:
    """Gives a block its parameters before it runs, and takes them away afterwards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        found: dict[str, Binding],
        block: tuple[nn.Module, list[Place]],
        device: torch.device,
    ) -> None:
        self.checkpoint, self.found, self.device = checkpoint, found, device
        self.block, self.places = block
        self.by_rows = looks_up_its_input(self.block) and all(found[name].plain for _, _, name in self.places)
        self.absent = [_Absent(cast(Tensor, module._parameters[key]), device) for module, key, _ in self.places]

    def attach(self) -> None:
        self._put(self.absent)
        self.block.register_forward_pre_hook(self._load)
        self.block.register_forward_hook(self._unload, always_call=True)

    def _load(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        made: dict[int, dict[str, Tensor]] = {}
        for module, key, name in self.places:
            binding = self.found[name]
            if self.by_rows:
                value = self._rows(binding.stored[0], inputs[0])
            else:
                if id(binding) not in made:
                    made[id(binding)] = binding.to_live({n: self.checkpoint.tensor(n) for n in binding.stored})
                values = made[id(binding)]
                value = values[name] if name in values else next(iter(values.values()))  # tied: under another name
                value = value.to(self.device, torch.float32)
            module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _rows(self, name: str, ids: Tensor) -> Tensor:
        """Return an embedding that has only the rows that are looked up; the others are never in memory."""
        stored = self.checkpoint.tensor(name)
        value = torch.from_numpy(np.zeros(tuple(stored.shape), np.float32))  # the system gives zeros when touched
        rows = ids.unique().cpu()
        value[rows] = stored[rows].float()
        return value.to(self.device)

    def _unload(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._put(self.absent)

    def _put(self, values: Sequence[Tensor]) -> None:
        for (module, key, _), value in zip(self.places, values, strict=True):
            module._parameters[key] = cast(nn.Parameter, value)


class _Absent(Tensor):
    """Stands for a parameter that is on disk: a model may ask for its device, dtype and shape, not its values."""

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device) -> "_Absent":
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=torch.float32, device=device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise WeightsAbsent(str(func))


class WeightsAbsent(RuntimeError):
    """A model asks for values of parameters whose block does not run."""
