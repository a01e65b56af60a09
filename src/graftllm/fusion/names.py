"""What packs may be called, and the error that names those that there are."""

import re
from collections.abc import Iterable

from graftllm.errors import FusionError
from graftllm.recipe import PACK_NAME, RESERVED


def plain_name(name: str) -> str:
    """Return a name that a pack may have.

    Raises:
        ValueError: it is reserved, too long for a file, or not made of what file names and headers are made of.
    """
    if name in RESERVED or not re.fullmatch(PACK_NAME, name):
        raise ValueError(
            f"expected a plain name other than {', '.join(RESERVED[:-1])} and {RESERVED[-1]} (at most 64 of a-z, A-Z, "
            "0-9, '.', '-' and '_', the first a letter or digit); choose another"
        )
    return name


def check_names(names: Iterable[str]) -> None:
    """Refuse names that a pack cannot have.

    Raises:
        FusionError: there is one.
    """
    for name in names:
        try:
            plain_name(name)
        except ValueError as error:
            raise FusionError(f"pack {name!r}: {error}.") from error


def unknown_pack(name: str, known: Iterable[str]) -> FusionError:
    """Return the error that says what could have been asked for."""
    return FusionError(f"pack: expected one of {', '.join(known) or 'none, since there is none'}; found {name!r}.")
