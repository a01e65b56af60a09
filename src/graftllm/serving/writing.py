"""From logits to text, one choice at a time: drawing a token, and growing a text that may have to stop."""

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graftllm.serving.orders import Likely, Order, Token
from graftllm.stop_texts import begun_stop

_UNFINISHED = "�"  # what an incomplete UTF-8 sequence decodes to


_COLDEST = 1e-4  # below it the likeliest token is as good as certain


class Draw:
    """How one choice's tokens are drawn, whatever else is in the batch."""

    def __init__(self, order: Order, prompt: Sequence[int], choice: int) -> None:
        """Seed the choice's own generator; `prompt` is of the tokens that were read."""
        self._order = order
        penalised = (order.repetition_penalty, order.frequency_penalty, order.presence_penalty) != (1, 0, 0)
        self.takes_likeliest = order.temperature == 0 and not penalised
        self._prompt, self._written = frozenset(prompt), Counter[int]()
        seed = secrets.randbits(62) if order.seed is None else order.seed + choice
        self._generator = torch.Generator().manual_seed(seed % (1 << 63))

    def token(self, logits: Tensor) -> int:
        """Return the next token by logits of shape (vocabulary,)."""
        if self.takes_likeliest:
            return int(logits.argmax())
        token = self._token(self._penalised(logits.float().cpu()))
        self._written[token] += 1
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        """Return logits less attractive where tokens were there before, as vLLM has it.

        Repetition counts the prompt, too, and divides what is positive and multiplies what is negative
        (arXiv 1909.05858); frequency is subtracted once for each time, presence once.
        """
        logits = logits.clone()
        if self._order.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._written.keys()))
            found = logits[seen]
            penalty = self._order.repetition_penalty
            logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
        if self._written:
            counts = torch.tensor(list(self._written.values()))
            logits[list(self._written)] -= self._order.frequency_penalty * counts + self._order.presence_penalty
        return logits

    def _token(self, logits: Tensor) -> int:
        order = self._order
        if order.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax((logits - logits.max()) / max(order.temperature, _COLDEST), dim=0)
        if order.min_p:
            probabilities[probabilities < order.min_p * probabilities.max()] = 0.0
        if 0 < order.top_k < len(probabilities):
            kept = probabilities.topk(order.top_k)
            probabilities = torch.zeros_like(probabilities).index_copy_(0, kept.indices, kept.values)
        if order.top_p < 1:
            probabilities /= probabilities.sum()
            ranked, places = probabilities.sort(descending=True)
            before = ranked.cumsum(0) - ranked  # what is more probable than each
            probabilities = probabilities.index_fill(0, places[1:][before[1:] >= order.top_p], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def scored(logits: Tensor, token: int, count: int, tokenizer: PreTrainedTokenizerBase) -> Token:
    """Return a token's log-probability and the `count` most probable tokens in its place.

    Args:
        logits: shape (vocabulary,).
        token: the one that was written.
        count: 0 or more.
        tokenizer: of the voice.
    """
    logprobs = torch.log_softmax(logits.float(), dim=0)
    best = logprobs.topk(min(count, len(logprobs)))

    def likely(one: int) -> Likely:
        return Likely(cast(str, tokenizer.decode([one])), float(logprobs[one]))

    return Token(likely(token), tuple(likely(int(one)) for one in best.indices))


class Text:
    """A text that grows by tokens. What may still change, or begin a stop text, is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        """Start empty."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._context = self._done = 0  # tokens before _done are text already; those from _context on are its context
        self._held = ""

    def add(self, token: int) -> str:
        """Take one more token; return what is certain now. Sets `stopped` when a stop text is there."""
        self._ids.append(token)
        return self._release(self._new_text(whole=False), whole=False)

    def finish(self) -> str:
        """Return what was held back."""
        return "" if self.stopped else self._release(self._new_text(whole=True), whole=True)

    def _new_text(self, *, whole: bool) -> str:
        """Return what the tokens after `_done` add to the text; a few tokens before them decide on spaces."""
        before = self._decoded(self._ids[self._context : self._done])
        after = self._decoded(self._ids[self._context :])
        if not whole and (after.endswith(_UNFINISHED) or len(after) <= len(before)):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str, *, whole: bool) -> str:
        self._held += text
        places = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if places:
            self.stopped = True
            released, self._held = self._held[: min(places)], ""
            return released
        kept = 0 if whole else begun_stop(self._held, self._stop)
        released, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return released
