"""The commands that share packs and grafted models on the Hugging Face Hub: push, pull. `cli` registers them.

Like there, no logic lives here and heavy imports happen inside the functions.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graftllm.terminal import AsJson, print_json


def push(
    source: Annotated[Path, typer.Argument(metavar="PACK|DIR", help="SkillPack, or grafted model directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/repo; made where there is none.")],
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the pack knows only a directory of yours.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository.  [default: its owner's settings]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to put it on.  [default: main]")] = None,
    json: AsJson = False,
) -> None:
    """Put a pack or a grafted model on the Hugging Face Hub, with a model card written from its header.

    Interrupted, the same command goes on: what the Hub already has is not sent again. Log in with `hf auth login`,
    or set HF_TOKEN.
    """
    from graftllm.hub.sharing import push as put

    pushed = put(source, repo, base=base, private=private, revision=revision)
    if json:
        print_json(asdict(pushed))
    else:
        print(f"{pushed.url}: commit {pushed.commit}")
        print(f"Others get it with: graftllm pull {pushed.repository}@{pushed.commit}")


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/repo, or user/repo@revision.")],
    out: Annotated[
        Path | None, typer.Option(help="File or directory to write.  [default: named after the repository]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.  [default: main]")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint directory of the base: checked, and used by a grafted model.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Get a pack or a grafted model from the Hugging Face Hub, checked as a stranger's before it appears.

    Everything comes from one commit, which is told. Interrupted, the same command goes on: files that are whole are
    in the Hub's cache.
    """
    from graftllm.hub.sharing import pull as get

    pulled = get(repo, out, revision=revision, base=base)
    if json:
        print_json(asdict(pulled) | {"path": str(pulled.path)})
    else:
        print(f"{pulled.path}: {pulled.repository} at commit {pulled.commit}, {', '.join(pulled.packs)}")
