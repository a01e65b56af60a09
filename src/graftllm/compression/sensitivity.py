"""How much an error at every layer's output changes what the tuned model says.

One backward pass over calibration rows, with answers drawn from the model itself, gives for every
matrix the second moments of the gradient at its output: the output factor of the Fisher information
(arXiv 1503.05671). With the input's second moments this is the KL divergence, in nats a predicted
token, that a small error in the weights causes.

Answers are drawn, and gradients taken, with the logits divided by a temperature. A fine-tune that is sure of
its answers has almost no gradient but at the few tokens where it is not, although errors as large as those of a small
pack shake the others, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from graftllm.checkpoint import Checkpoint
from graftllm.compression.experts import ExpertWatcher, Slice
from graftllm.compression.matrix import matrix_shape
from graftllm.compression.metric import shrunk
from graftllm.compression.prices import MAX_LENGTH, SEQUENCES, Sensitivity
from graftllm.devices import memory_bytes
from graftllm.errors import CheckpointError, CompressionError
from graftllm.live import Binding, bindings, looks_up_its_input
from graftllm.loading import load_model, load_tokenizer
from graftllm.progress import track
from graftllm.records import Prompt
from graftllm.rendering import Answered, context_length, pad, parted, render_answered
from graftllm.streaming import check_reads_text

_BATCH = 4
_TOKENS = 1 << 18  # of all rows together, as many as GPTQ reads
_TEMPERATURE = 2.0  # 1.5 to 4 are about as good; at 1, packs of sure models had up to a hundred times the divergence


def fits_in_memory(checkpoint: Checkpoint, device: torch.device, copies: int = 2) -> bool:
    """Return whether so many copies of the whole model fit; by default its weights, and as much for activations."""
    if device.type == "cuda":
        return copies * checkpoint.nbytes <= torch.cuda.get_device_properties(device).total_memory
    return copies * 4 * checkpoint.parameters <= memory_bytes()  # float32


Weights = Mapping[str, Sequence[Tensor]]  # by parameter name, of each sequence: (tokens,), with mean 1 over all


def measure_sensitivity(tuned: Path, rows: Sequence[Prompt], *, device: str = "auto") -> tuple[Sensitivity, Weights]:
    """Run the tuned model forward and backward over the first 512 rows, at most 262,144 tokens.

    Args:
        tuned: checkpoint directory.
        rows: conversations; where there is an answer only its tokens count as predicted.
        device: `auto` takes a GPU when there is one.

    Returns:
        What was found, and how much each token counts in the second moments of the inputs of linear layers: the norm
        of the gradient at the output. Layers that get the same input share the sum of theirs, under the first's name.

    Raises:
        CheckpointError: transformers cannot load the model, as a causal language model, or its tokenizer; or it says
            what is no number.
        CompressionError: no row has two tokens; or as for `check_reads_text`.
    """
    checkpoint = Checkpoint.open(tuned)
    check_reads_text(checkpoint)
    model, tokenizer = load_model(tuned, device=device), load_tokenizer(tuned)
    model.requires_grad_(False)
    model.set_experts_implementation("eager")  # one product per expert, which can be watched
    found = {live: binding for binding in bindings(model, checkpoint.specs) for live in binding.live}
    stored = {live: binding.stored[0] for live, binding in found.items() if binding.plain}
    sequences = to_calibrate(tokenizer, model, rows)
    uncalled = _uncalled(model, tokenizer, stored, sequences, found, checkpoint)
    watcher = _Watcher(model, stored, found, checkpoint, uncalled)
    draw = torch.Generator(device=model.device).manual_seed(0)
    predicted = 0
    for start in track(range(0, len(sequences), _BATCH), label="sensitivity"):
        batch = sequences[start : start + _BATCH]
        ids, mask = pad([row for row, _ in batch], tokenizer, model)
        answers = predicting(batch, mask)
        watcher.ids, watcher.mask, watcher.experts.mask = ids, mask.bool(), mask.bool()
        with watcher.experts:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[answers].float()
        if not bool(logits.detach().isfinite().all()):
            raise CheckpointError(
                f"{tuned}: says what is no number on calibration rows. The training diverged or a file is damaged; "
                "pack an earlier checkpoint."
            )
        chances = (logits / _TEMPERATURE).log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=draw)
        (_TEMPERATURE * chances.gather(1, drawn)).sum().backward()
        watcher.collect()
        predicted += len(drawn)
    if not predicted:
        raise CompressionError(
            "calibration: expected rows of two tokens or more, so that one is predicted; found none. Give others."
        )
    lengths = [len(row) for row, _ in sequences]
    return watcher.sensitivity(predicted, sum(lengths)), watcher.weights(lengths)


def answered(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Prompt]) -> list[Answered]:
    """Return the tokens of rows that have any."""
    return [row for row in (render_answered(tokenizer, row) for row in rows) if row[0]]


def to_calibrate(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: Sequence[Prompt]) -> list[Answered]:
    """Return the tokens of the rows that calibration reads: the first 512, while they have at most 262,144 in all.

    A row has at most 2,048, or as many as the model reads at once. Longer text is read in parts; where there is an
    answer it is cut.
    """
    found, tokens = parted(answered(tokenizer, rows[:SEQUENCES]), MAX_LENGTH, context_length(model))[:SEQUENCES], 0
    for count, (ids, _) in enumerate(found):
        tokens += len(ids)
        if tokens > _TOKENS:
            return found[: max(1, count)]
    return found


def predicting(batch: Sequence[Answered], mask: Tensor) -> Tensor:
    """Return at which places of a batch, padded on the right, a token of an answer is predicted: a mask like `mask`.

    Where there is no answer every token counts as one.
    """
    places = torch.zeros_like(mask, dtype=torch.bool)
    for i, (row, first) in enumerate(batch):
        places[i, (first if first < len(row) else 1) - 1 : len(row) - 1] = True
    return places


def _is_watched(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or looks_up_its_input(module)


@torch.no_grad()
def _uncalled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stored: Mapping[str, str],
    sequences: Sequence[Answered],
    found: Mapping[str, Binding],
    checkpoint: Checkpoint,
) -> dict[str, nn.Parameter]:
    """Return by stored name the matrices that the model uses without running a layer that could be watched.

    Such are convolutions, a state-space layer's decay, routers that return more than one tensor, and what fused kernels
    read; stacks whose slices are multiplied one by one, as experts are, are not.
    """
    called: set[int] = set()

    def call(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            called.add(id(module.weight))

    experts = ExpertWatcher(model, found, checkpoint.specs)
    hooks = [module.register_forward_hook(call) for module in model.modules() if _is_watched(module)]
    if sequences:
        ids, mask = pad([sequences[0][0]], tokenizer, model)
        experts.mask = mask.bool()
        with experts:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in (*hooks, *experts.hooks):
        hook.remove()
    called |= {id(value) for name, value in model.named_parameters() if name in experts.multiplied}
    return {
        stored[name]: value
        for name, value in model.named_parameters()
        if name in stored and id(value) not in called and min(matrix_shape(tuple(value.shape))) > 1
    }


class _Watcher:
    """Sums the squared gradients at the outputs of linear layers and embeddings, padding left out."""

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, str],
        found: Mapping[str, Binding],
        checkpoint: Checkpoint,
        uncalled: Mapping[str, nn.Parameter],
    ) -> None:
        self.ids = self.mask = torch.empty(0)  # of the running pass, (rows, length)
        self.outputs: dict[str, Tensor] = {}
        self.reads: dict[str, Tensor] = {}
        self.read_outputs: dict[str, Tensor] = {}
        self._norms: dict[str, list[Tensor]] = {}  # of gradients, by matrix, in the order of the tokens
        self._sharing: dict[str, str] = {}  # matrix -> the first that got the same input
        self._last: tuple[Tensor | None, str] = (None, "")
        self._specs, self._reached = checkpoint.specs, Counter[str]()  # how many tokens each expert's matrix saw
        self._times = Counter[str]()  # how many tokens read each embedding, or matrices of a stack
        self.experts = ExpertWatcher(model, found, checkpoint.specs, self._expert, self._turned_expert)
        self.rows: dict[str, Tensor] = {}
        self._uncalled = {name: value.requires_grad_() for name, value in uncalled.items()}
        tied = {id(value): stored[name] for name, value in model.named_parameters() if name in stored}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or id(weight) not in tied:
                continue
            if looks_up_its_input(module):
                module.register_forward_hook(partial(self._read, tied[id(weight)]))
            elif _is_watched(module):
                module.register_forward_hook(partial(self._linear, tied[id(weight)]))

    def collect(self) -> None:
        """Take the gradients of the running pass off what no layer was seen to use.

        Answers are drawn, so gradients of different tokens cancel on average, and the square of their sum is, on
        average, the sum of their squares.
        """
        for name, value in self._uncalled.items():
            if value.grad is not None:
                squares = value.grad.float().square().reshape(matrix_shape(tuple(value.shape)))
                self.rows[name] = self.rows.get(name, 0) + squares.mean(1)
                value.grad = None

    def sensitivity(self, predicted: int, tokens: int) -> Sensitivity:
        """Return what was found, as half the mean over predicted tokens; `tokens` are all that were read."""
        share, times = 0.5 / max(1, predicted), self._times
        return Sensitivity(
            {name: (total * share).cpu() for name, total in self.outputs.items()},
            {name: (total * share).cpu() for name, total in self.reads.items()},
            {name: shrunk(total / times[name], times[name]).cpu() for name, total in self.read_outputs.items()},
            {name: count / tokens for name, count in self._reached.items()},
            {name: (total * share).cpu() for name, total in self.rows.items()},
        )

    def weights(self, lengths: Sequence[int]) -> Weights:
        """Return how much each token counts, sequence by sequence, for layers that every token reached once."""
        shared: dict[str, Tensor] = {}
        for name, norms in self._norms.items():
            of_tokens, first = torch.cat(norms), self._sharing[name]
            if len(of_tokens) == sum(lengths) and float(of_tokens.sum()) > 0:
                shared[first] = shared.get(first, 0) + of_tokens / of_tokens.mean()
        return {first: (found / found.mean()).split(list(lengths)) for first, found in shared.items()}

    def _linear(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._last = inputs[0], self._last[1] if inputs[0] is self._last[0] else name
        self._sharing.setdefault(name, self._last[1])

        def add(gradient: Tensor) -> None:
            squares = self._seen(gradient).square()
            self.outputs[name] = self.outputs.get(name, 0) + squares.sum(0)
            self._norms.setdefault(name, []).append(squares.sum(1).sqrt().cpu())

        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(add)

    def _expert(self, part: Slice, x: Tensor, output: Tensor) -> None:
        if not part.rows or not output.requires_grad:
            return
        count = int(x.detach().any(1).sum())  # padding is zeros
        for name in part.rows:
            self._reached[name] += count

        def add(gradient: Tensor) -> None:
            squares = gradient.flatten(0, -2).float().square().sum(0)
            for name, (stored, here) in part.rows.items():
                if name not in self.outputs:
                    self.outputs[name] = squares.new_zeros(matrix_shape(self._specs[name].shape)[0])
                self.outputs[name][stored] += squares[here]

        output.register_hook(add)

    def _turned_expert(self, part: Slice, x: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = x.detach().float()
        for name, (stored, here) in part.rows.items():
            if name not in self.reads:
                self.reads[name] = x.new_zeros(matrix_shape(self._specs[name].shape)[0])
            self.reads[name][stored] += x.square().sum(0)[here]
            self._times[name] += int(x.any(1).sum())

        def add(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float()
            for name in part.rows:
                self.read_outputs[name] = self.read_outputs.get(name, 0) + g.T @ g

        output.register_hook(add)

    def _read(self, name: str, module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = inputs[0]
        if ids.shape[-1] != self.ids.shape[1] or ids.numel() not in (ids.shape[-1], self.ids.numel()):
            return output
        # Positions may be the same for all rows: each row gets its own, so that gradients are told apart.
        output = output.detach().expand(*self.ids.shape, output.shape[-1]).requires_grad_()
        ids = ids.expand(self.ids.shape)[self.mask]
        counts = torch.bincount(ids, minlength=module.num_embeddings).float()
        self.reads[name] = self.reads.get(name, 0) + counts
        self._times[name] += len(ids)

        def add(gradient: Tensor) -> None:
            g = self._seen(gradient)  # (tokens, d)
            self.read_outputs[name] = self.read_outputs.get(name, 0) + g.T @ g

        output.register_hook(add)
        return output.clone()  # which the model may change in place

    def _seen(self, gradient: Tensor) -> Tensor:
        """Return the gradients of all tokens but padding, (tokens, d_out)."""
        kept = gradient[self.mask] if gradient.shape[:2] == self.mask.shape else gradient.flatten(0, -2)
        return kept.float()
