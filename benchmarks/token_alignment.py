"""Distributions of one tokenizer as distributions of another, as FuseLLM and FuseChat do it.

Two tokenizers cut the same text differently. Token sequences are aligned by dynamic programming whose cost is the
edit distance between tokens (arXiv 2401.10491), and words of one vocabulary stand for those of the other that they are
aligned with most often over all texts; for words that never are, the one at the least edit distance
(MinED with statistics, arXiv 2408.07990).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

END = "\x00end"  # what every tokenizer's end of a turn is called here


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what each token of a vocabulary says, by id: spaces as spaces, the end of a turn as `END`."""
    names: Any = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [str(name).replace("Ġ", " ").replace("▁", " ") for name in names]
    end = tokenizer.eos_token_id
    if isinstance(end, int):
        texts[end] = END
    return texts


@lru_cache(maxsize=1 << 20)
def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and replacements of letters that make `b` of `a`."""
    if END in (a, b):
        return 0 if a == b else max(len(a), len(b))
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return row[-1]


def align(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """Align two token sequences of one text at the least sum of edit distances.

    The path of dynamic time warping: monotone, every token of either side is on it, first with first, last with last.
    Of equally cheap steps the diagonal one is taken.

    Args:
        source: tokens of one tokenizer, at least one.
        target: tokens of the other, at least one.

    Returns:
        For each target token the places of its source tokens, ascending.
    """
    inf = float("inf")
    cost = [[inf] * (len(target) + 1) for _ in range(len(source) + 1)]
    cost[0][0] = 0.0
    for i, a in enumerate(source, 1):
        for j, b in enumerate(target, 1):
            cost[i][j] = edit_distance(a, b) + min(cost[i - 1][j - 1], cost[i - 1][j], cost[i][j - 1])
    places: list[list[int]] = [[] for _ in target]
    i, j = len(source), len(target)
    while i and j:
        places[j - 1].append(i - 1)
        steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(steps, key=lambda step: cost[step[0]][step[1]])
    return [found[::-1] for found in places]


def single(places: Sequence[Sequence[int]]) -> list[int | None]:
    """Return for each target token its source token if each is the other's only one, else None."""
    uses = Counter(place for found in places for place in found)
    return [found[0] if len(found) == 1 and uses[found[0]] == 1 else None for found in places]


def vocabulary_map(
    source: Sequence[str], target: Sequence[str], texts: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """Return the target word that each source word stands for.

    Args:
        source: what each source token says.
        target: what each target token says.
        texts: the same texts as source ids and as target ids.

    Returns:
        Target ids, shape (source vocabulary,): the one that the word is aligned with alone most often, else the one
        at the least edit distance (of equally near ones the first).
    """
    seen: dict[int, Counter[int]] = defaultdict(Counter)
    for source_ids, target_ids in texts:
        places = align([source[i] for i in source_ids], [target[i] for i in target_ids])
        for target_id, place in zip(target_ids, single(places), strict=True):
            if place is not None:
                seen[source_ids[place]][target_id] += 1
    by_text = {text: i for i, text in reversed(list(enumerate(target)))}

    def nearest(word: str) -> int:
        if word in by_text:
            return by_text[word]
        return min(range(len(target)), key=lambda i: edit_distance(word, target[i]))

    return torch.tensor([seen[i].most_common(1)[0][0] if seen[i] else nearest(word) for i, word in enumerate(source)])


def carry_over(
    probabilities: Tensor,
    source_texts: Sequence[str],
    target_texts: Sequence[str],
    target_ids: Sequence[int],
    words: Tensor,
    vocabulary: int,
) -> Tensor:
    """Return a source's distributions at the tokens of one text as distributions over the target's vocabulary.

    A target token that has no source token of its own alone gets all probability itself, as published.

    Args:
        probabilities: of each source token's place, shape (source tokens, source vocabulary).
        source_texts: what the source tokens of the text say.
        target_texts: what its target tokens say.
        target_ids: the ids of those.
        words: what `vocabulary_map` returned.
        vocabulary: number of target words.

    Returns:
        Shape (target tokens, vocabulary); each row sums to 1.
    """
    carried = torch.zeros(len(target_ids), vocabulary)
    for row, place in enumerate(single(align(source_texts, target_texts))):
        if place is None:
            carried[row, target_ids[row]] = 1.0
        else:
            carried[row].index_add_(0, words, probabilities[place])
    return carried
