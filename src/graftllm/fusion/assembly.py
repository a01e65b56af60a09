"""Putting a grafted model together: packs, rules and a router that is trained on prompts, into a directory."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from graftllm.checkpoint import Checkpoint
from graftllm.errors import FusionError
from graftllm.fusion.directory import add_packs, check_fusable, check_new, open_fitting, write_grafted
from graftllm.fusion.manifest import MANIFEST, Manifest, open_base, open_router, read_manifest, sha256_of
from graftllm.fusion.names import check_names
from graftllm.fusion.routes import BASE
from graftllm.fusion.rules import Rule
from graftllm.recipe import RouterOptions
from graftllm.records import Prompt, read_prompts


def fuse_packs(
    out: Path,
    base: str,
    packs: Mapping[str, Path],
    *,
    router_data: Path | None = None,
    options: RouterOptions | None = None,
    rules: Sequence[Rule] = (),
    device: str = "auto",
) -> None:
    """Write a grafted directory, with a router trained on prompt rows if there are any.

    Args:
        out: appears whole or not at all.
        base: checkpoint directory or Hub id.
        packs: pack files by the names they shall have.
        router_data: JSONL prompt rows; those whose task is a pack's name are for that pack, all others for the base.
        options: how the router is trained and decides, if there is one.
        rules: prompts that go to a pack whatever the router says.
        device: `auto` takes a GPU when there is one.

    Raises:
        FusionError: a grafted model with other packs is there, a name is reserved, a pack is for another base or
            has no prompts, a rule names no pack, or there are options but no rows.
        PackError: a pack is damaged or was made for another base.
    """
    check_names(packs)
    router = None
    if options is not None and router_data is None:
        raise FusionError("router: expected prompt rows (--router-data) to train it on, found none; give some.")
    check_fusable(out, [*packs.values(), *([] if router_data is None else [router_data])])
    check_none_lost(out, packs)
    if router_data is not None:
        prompts, checkpoint = _prompts(router_data, packs), Checkpoint.open(base)
        open_fitting(packs, checkpoint)
        from graftllm.fusion.fitting import fit_router

        router = fit_router(checkpoint.path, prompts, options or RouterOptions(), device=device)
    write_grafted(out, base, packs, router, rules)


def check_none_lost(out: Path, names: Collection[str]) -> None:
    """Check that a grafted model in the place of another one has packs of all its names.

    Raises:
        FusionError: it lacks one, or what is there has a manifest of another kind.
    """
    if (out / MANIFEST).exists() and (lost := sorted(set(read_manifest(out).packs) - set(names))):
        raise FusionError(
            f"{out}: is a grafted model with the pack {lost[0]!r} as well, which would be lost. `graftllm add` puts "
            "packs beside those that are there; to begin anew, choose another place or take that away."
        )


def join_packs(
    directory: Path,
    packs: Mapping[str, Path],
    *,
    router_data: Path | None = None,
    drift: float | None = None,
    device: str = "auto",
) -> Manifest:
    """Add packs to a grafted directory, and teach its router their prompts if there are any.

    A pack that is there already, but came without prompts, is taught to the router alone.

    Args:
        directory: a grafted model.
        packs: pack files by the names they shall have.
        router_data: JSONL prompt rows, of which those whose task is a new pack's name are for that pack; the prompts
            of the old packs are not needed.
        drift: share of any old class's held-out prompts that may go elsewhere then; the router's own by default.
        device: `auto` takes a GPU when there is one.

    Returns:
        The new manifest.

    Raises:
        FusionError: a name is taken or reserved, a pack is for another base or has no prompts,
            the base was changed, there is no router to teach, the new prompts are too much like an old pack's, or
            another process changed the router meanwhile.
        PackError: a pack is damaged or was made for another base.
    """
    manifest, router = read_manifest(directory), None
    new = packs if router_data is None else _without_untaught(manifest, packs)
    check_new(directory, manifest, new)
    if drift is not None and router_data is None:
        raise FusionError("--drift: is of the router, which learns from --router-data; give both, or neither.")
    if drift is not None and not 0 <= drift <= 1:
        raise FusionError(f"--drift: expected a share from 0 to 1, found {drift:g}.")
    if router_data is not None:
        router = open_router(directory, manifest)
        if router is None:
            raise FusionError(
                f"{directory}: has no router that could learn of a pack; write it anew with "
                "`graftllm fuse --router-data`, or add packs without --router-data."
            )
        from graftllm.fusion.fitting import check_prompts, features_of
        from graftllm.loading import load_model, load_tokenizer

        prompts = _prompts(router_data, packs)
        base = open_base(directory, manifest)
        open_fitting(packs, base)
        check_prompts({name: prompts[name] for name in packs})
        model, tokenizer = load_model(base.path, device=device), load_tokenizer(base.path)
        for name in packs:
            label = f"router: {name}"
            features = features_of(model, tokenizer, prompts[name], router.options, label=label)
            router = router.with_pack(name, features, drift=drift)
    return add_packs(directory, new, router=router, taught=manifest if router_data else None)


def _without_untaught(manifest: Manifest, packs: Mapping[str, Path]) -> dict[str, Path]:
    """Return packs without those that are on the shelf by this name, but that its router does not know."""
    untaught = {name: manifest.packs[name].sha256 for name in manifest.unrouted()}
    return {
        name: file
        for name, file in packs.items()
        if name not in untaught or not file.is_file() or sha256_of(file) != untaught[name]
    }


def _prompts(file: Path, packs: Mapping[str, Path]) -> dict[str, list[Prompt]]:
    """Return rows by the pack that their task names, and all others under `base`."""
    prompts: dict[str, list[Prompt]] = {}
    for row in read_prompts(file):
        prompts.setdefault(row.task if row.task in packs else BASE, []).append(row)
    if missing := [name for name in packs if name not in prompts]:
        raise FusionError(f"{file}: no row has the task {missing[0]!r}; the router needs prompts of every pack.")
    return prompts
