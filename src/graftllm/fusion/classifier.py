"""The router's classifier: trained on features by class, and calibrated on prompts that it has not seen.

Linear, GELU, Linear; the class 0 is the base. A prompt that is unlike the examples of the class
that it is taken for is left to the base, too. Nothing here knows texts, names or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graftllm.recipe import RouterOptions
from graftllm.threads import one_thread

_HIDDEN = 128
_BATCH = 256
_FOLDS = 4
_SHRINKAGE = 0.1
_MARGIN = 2.0  # how much stranger than the strangest known prompt of a pack another may be


@dataclass(frozen=True)
class Classifier:
    """A network, and where the prompts lie that it was trained on.

    Attributes:
        network: maps standardized features (prompts, width) to logits (prompts, classes).
        center: mean of the features, shape (width,).
        spread: their standard deviation, shape (width,).
        whitening: shape (width, width); features times it have about unit variance within a class.
        known: by class, whitened features of its examples, shape (examples, width).
        hidden: by class, what the network's first layer makes of them, scaled to length 1, (examples, hidden).
    """

    network: nn.Sequential
    center: Tensor
    spread: Tensor
    whitening: Tensor
    known: Sequence[Tensor]
    hidden: Sequence[Tensor]

    @torch.inference_mode()
    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and how strange each prompt would be in each class, both of shape (prompts, classes).

        Strangeness is the distance to the class's nearest example (arXiv 2204.06507): a Mahalanobis distance between
        features, times the root of the cosine distance in the hidden layer. The first knows prompts of a kind never
        seen, the second those that resemble one class in some ways and another in others.
        """
        white, inner = features @ self.whitening, self._hidden(features)
        strangeness = [self._strangeness(white, inner, i) for i in range(len(self.known))]
        return self._logits(features), torch.stack(strangeness, dim=1)

    @torch.inference_mode()
    def read_likeliest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `read` does, with strangeness in the most probable pack alone, and 0 in the other classes."""
        logits = self._logits(features)
        white, inner = features @ self.whitening, self._hidden(features)
        strangeness = torch.zeros_like(logits)
        likeliest = _likeliest(logits)
        for i in set(likeliest.tolist()):
            rows = likeliest == i
            strangeness[rows, i] = self._strangeness(white[rows], inner[rows], i)
        return logits, strangeness

    def _logits(self, features: Tensor) -> Tensor:
        return self.network((features - self.center) / self.spread)

    def _strangeness(self, white: Tensor, inner: Tensor, i: int) -> Tensor:
        """Return how strange prompts would be in a class, shape (prompts,), by what `read` compares."""
        near = (1 - inner @ self.hidden[i].T).amin(dim=1).clamp(min=0)
        return torch.cdist(white, self.known[i]).amin(dim=1) * near.sqrt()

    def _hidden(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.network[:2]((features - self.center) / self.spread), dim=1)


@dataclass(frozen=True)
class Calibration:
    """What was chosen on prompts that the classifier had not been trained on.

    Attributes:
        temperature: logits are divided by it, so that probabilities match frequencies.
        threshold: when it is not more probable than this that any pack is asked for, the base answers.
        limits: by class, how strange a prompt of it may be; else the base answers.
    """

    temperature: float
    threshold: float
    limits: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What becomes of some prompts.

    Attributes:
        probabilities: shape (prompts, classes).
        packed: of any pack, whichever it is, shape (prompts,).
        chosen: number of the class that answers, 0 for the base, shape (prompts,).
        strange: whether the prompt is unlike all of the pack that it was taken for, shape (prompts,).
    """

    probabilities: Tensor
    packed: Tensor
    chosen: Tensor
    strange: Tensor


def judge(logits: Tensor, strangeness: Tensor, calibration: Calibration) -> Verdict:
    """Decide about prompts by logits and strangeness, each of shape (prompts, classes).

    First whether any pack is asked for, then which: packs that nobody can tell apart share their probability.
    """
    probabilities = torch.softmax(logits / calibration.temperature, dim=1)
    packed, taken = 1 - probabilities[:, 0], _likeliest(logits)
    wanted, limits = packed > calibration.threshold, torch.tensor(calibration.limits)
    strange = wanted & (strangeness.gather(1, taken[:, None])[:, 0] > limits[taken])
    return Verdict(probabilities, packed, torch.where(wanted & ~strange, taken, 0), strange)


def train_classifier(
    classes: Sequence[Tensor], options: RouterOptions, *, sampled: int, seed: int
) -> tuple[nn.Sequential, Calibration, Tensor]:
    """Train a network and calibrate it by cross-validation with four folds.

    Args:
        classes: features of the base's prompts, then of each pack's, each of shape (prompts, width).
        options: steps, and the bounds of the threshold.
        sampled: how many of the base's prompts, the first, are a sample of those to come.
        seed: of initial weights and batches.

    Returns:
        The network; when the base answers; and the class that each prompt goes to when the network has not seen it,
        class after class, int16. The same on one machine and PyTorch, whatever the number of threads.
    """
    with one_thread():
        logits, strangeness = _unseen(classes, options.steps, seed)
        labels = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(classes)])
        own = strangeness.gather(1, labels[:, None])[:, 0].split([len(rows) for rows in classes])
        limits = tuple(_MARGIN * float(rows.max()) for rows in own)
        loose = Calibration(_temperature(logits, labels), 0.0, limits)
        verdict = judge(logits[:sampled], strangeness[:sampled], loose)
        asked = torch.where(verdict.chosen > 0, verdict.packed, 0.0)  # of general prompts
        threshold = max(options.threshold, _exceeded_by(asked, options.false_accept))
        calibration = replace(loose, threshold=threshold)
        held_out = judge(logits, strangeness, calibration).chosen.to(torch.int16)
        return _fit(classes, options.steps, seed), calibration, held_out


def classifier_of(network: nn.Sequential, classes: Sequence[Tensor]) -> Classifier:
    """Return what a network and its examples make; the same examples that it was trained on.

    The covariance for whitening is that within classes, shrunk a tenth of the way to a multiple of the identity.
    """
    rows = torch.cat(list(classes))
    inner = torch.cat([part - part.mean(dim=0) for part in classes])
    covariance = inner.T @ inner / max(1, len(rows) - len(classes))  # (width, width)
    variance = covariance.diagonal().mean().clamp(min=1e-12)
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * variance * torch.eye(len(covariance))
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T.contiguous()
    bare = Classifier(network, *_standard(rows), whitening, [part @ whitening for part in classes], [])
    return Classifier(network, bare.center, bare.spread, whitening, bare.known, [bare._hidden(p) for p in classes])


def new_network(width: int, classes: int, *, seed: int) -> nn.Sequential:
    """Return an untrained network; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, classes))


def _fit(classes: Sequence[Tensor], steps: int, seed: int) -> nn.Sequential:
    """Train a network on features by class; rare classes weigh as much as frequent ones."""
    rows = torch.cat(list(classes))
    center, spread = _standard(rows)
    inputs = (rows - center) / spread
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(classes)])
    network = new_network(inputs.shape[1], len(classes), seed=seed)
    weights = len(labels) / (len(classes) * torch.bincount(labels, minlength=len(classes)).clamp(min=1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(labels), (min(_BATCH, len(labels)),), generator=draw)
        loss = nn.functional.cross_entropy(network(inputs[batch]), labels[batch], weight=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.half().float().requires_grad_(False).eval()  # as the file stores it


def _unseen(classes: Sequence[Tensor], steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits and strangeness of every row by a classifier of the other folds, as `Classifier.read` does."""
    folds = [torch.arange(len(rows)) % _FOLDS for rows in classes]
    every = torch.cat(folds)
    logits, strangeness = (torch.empty(len(every), len(classes)) for _ in range(2))
    for fold in range(_FOLDS):
        rest = [rows[held != fold] for rows, held in zip(classes, folds, strict=True)]
        mine = torch.cat([rows[held == fold] for rows, held in zip(classes, folds, strict=True)])
        logits[every == fold], strangeness[every == fold] = classifier_of(_fit(rest, steps, seed), rest).read(mine)
    return logits, strangeness


def _likeliest(logits: Tensor) -> Tensor:
    """Return the number of the most probable pack, shape (prompts,), by logits of shape (prompts, classes).

    Without any pack it is that of the base.
    """
    packs = logits[:, 1:]
    return packs.argmax(dim=1) + 1 if packs.shape[1] else torch.zeros(len(logits), dtype=torch.long)


def _exceeded_by(values: Tensor, rate: float) -> float:
    """Return which of the values a new draw exceeds with at most this probability, or the largest.

    A new draw exceeds the k-th largest of n with probability k / (n + 1), or less where some are equal (split conformal
    prediction, arXiv 2107.07511). So k = floor(rate * (n + 1)), and where that is 0, n values can promise no such
    rate: k is 1 then, and 1 / (n + 1) is the least that they can.
    """
    k = max(1, int(rate * (len(values) + 1)))
    return float(values.sort(descending=True).values[k - 1])


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature of least log-loss, from 1 to 10: so few prompts do not justify more certainty."""
    grid = torch.logspace(0, 1, 81)
    losses = [float(nn.functional.cross_entropy(logits / temperature, labels)) for temperature in grid]
    return float(grid[min(range(len(losses)), key=losses.__getitem__)])


def _standard(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of features."""
    return rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-6)
