"""Texts that end an answer: where they cut it, and what of a stream may be the beginning of one."""

from collections.abc import Iterable, Iterator, Sequence


def up_to_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield a text's pieces up to the first of the texts that end an answer."""
    held = ""
    for piece in pieces:
        held += piece
        if (text := stopped_at(held, stop)) != held:
            yield text
            return
        certain = len(held) - begun_stop(held, stop)
        yield held[:certain]
        held = held[certain:]
    yield held


def begun_stop(text: str, stop: Sequence[str]) -> int:
    """Return how many of a text's last characters may be the beginning of a text that ends an answer.

    >>> begun_stop("so. En", ["End", "."]), begun_stop("so", ["End"])
    (2, 0)
    """
    longest = max(map(len, stop), default=0)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(word.startswith(text[-size:]) for word in stop)), 0)


def stopped_at(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the texts that end an answer."""
    return text[: min([len(text), *(place for word in stop if (place := text.find(word)) >= 0)])]
