"""Reasoning traces: what a model thinks aloud between `<think>` and `</think>` before it answers."""

OPENING, CLOSING = "<think>", "</think>"


def without_reasoning(text: str) -> str:
    r"""Return the answer behind a reasoning trace; empty when the trace never ends.

    A trace whose opening tag stood in the prompt (as some chat templates have it) is known by its closing tag.

    >>> without_reasoning("<think>2 + 2...</think>\n\n4"), without_reasoning("4 "), without_reasoning("<think>2")
    ('4', '4 ', '')
    """
    if CLOSING in text:
        return text.rpartition(CLOSING)[2].lstrip()
    return "" if text.lstrip().startswith(OPENING) else text


def with_reasoning(reasoning: str, answer: str) -> str:
    r"""Return an answer behind its reasoning trace, which an endpoint gave apart; the inverse of `without_reasoning`.

    >>> with_reasoning("2 + 2", "4")
    '<think>\n2 + 2\n</think>\n\n4'
    """
    return f"{OPENING}\n{reasoning.strip()}\n{CLOSING}\n\n{answer}" if reasoning.strip() else answer
