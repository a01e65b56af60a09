"""Files of repositories on the Hugging Face Hub, by way of its cache; whatever goes wrong there is one line.

This room knows names, revisions and files, not what is in them: what comes from the Hub is checked by its reader.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftllm.errors import HubError

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_TRANSPORTS = ("httpx", "httpx2")  # what the Hub's client speaks HTTP with, in one version or another


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub, `name` being user/repo, at a branch, tag or commit."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def repository(text: str, revision: str | None = None) -> Repository | None:
    """Return what `user/repo` or `user/repo@revision` means; None for a text that is no such name, or a path.

    Raises:
        HubError: two different revisions are asked for.
    """
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", text)
    if found is None or Path(found[1]).exists():
        return None
    if revision and found[2] and revision != found[2]:
        raise HubError(f"{text}: expected one revision, found {found[2]} and {revision}; give one of them.")
    return Repository(found[1], revision or found[2])


def download(source: Repository, file: str) -> Path:
    """Return a file of a repository, downloaded or from the cache; it is below a directory named after the commit.

    A download that the network cuts goes on where it was.

    Raises:
        HubError: there is no such repository, revision or file, or the Hub cannot be reached or wants a token.
    """
    from huggingface_hub import hf_hub_download  # imported late: most runs are local

    with hub_errors(str(source), file):
        return Path(hf_hub_download(source.name, file, revision=source.revision))


def cached(source: Repository, file: str) -> Path | None:
    """Return a file of a repository that an earlier download left in the cache; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, file, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def download_all(source: Repository, patterns: Sequence[str]) -> Path:
    """Return a directory with the files of a repository that fit one of the patterns.

    Raises:
        HubError: as for `download`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(str(source)):
        return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=list(patterns)))


@contextmanager
def hub_errors(name: str, file: str = "file of that name") -> Iterator[None]:
    """Turn whatever the Hub's client raises inside the block into a HubError about the repository `name`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{name}: is gated; ask for access on its page on the Hub, then {_LOGIN}.") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: the Hub has no such repository, or none that you may see. Check the name; for a private one, "
            f"{_LOGIN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name}: the repository has no such revision; expected a branch, tag or commit of it."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(
            f"{name}: the repository has no {file}. Expected one that `graftllm push` made; check the name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.CachedRepoTreeNotFoundError) as error:
        raise HubError(
            f"{name}: not in the cache, and the Hub cannot be reached. Check the network, HF_ENDPOINT, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"{name}: the Hub wants a token; {_LOGIN}.") from error
    except errors.HFValidationError as error:
        raise HubError(f"{name}: not a name of a repository; expected user/repo.") from error
    except Exception as error:
        if (
            not isinstance(error, OSError | RuntimeError)
            and type(error).__module__.partition(".")[0] not in _TRANSPORTS
        ):
            raise
        raise HubError(f"{name}: {_failure(error)}") from error


def _failure(error: BaseException) -> str:
    """Return what happened to a request, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    status = None if cause is None else cause.response.status_code
    if status == 401:
        return f"the Hub wants a token, or does not accept this one; {_LOGIN}."
    if status == 403:
        return "this token may not do that there. Check the name, and take a token with write access."
    reason = type(error.__cause__ or error).__name__ if status is None else f"status {status}"
    return f"the Hub was left in the middle ({reason}). Run the same command again: files that are whole are kept."
