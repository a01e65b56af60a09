"""The README.md of a pack or a grafted model on the Hugging Face Hub, written from what headers say.

The front matter is what the Hub reads (https://huggingface.co/docs/hub/model-cards): base model, licence, tags and
scores; the text below it says what is inside and how to use it.
"""

import re
from collections.abc import Mapping, Sequence

from huggingface_hub import EvalResult, ModelCardData

from graftllm.evaluation.tables import Grid, pack_lines, role_grid
from graftllm.fusion.manifest import Manifest
from graftllm.header import Header
from graftllm.packfile import file_bytes

MARK = "<!-- Written by graftllm push; take this line out to keep your own text. -->"
_KNOWN_LICENSES = frozenset(  # those with a name on the Hub; others go by `other`
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++
    osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other""".split()
)


def pack_card(header: Header, repo: str, base: str) -> str:
    """Return the README.md of a repository with one pack.

    Args:
        header: the pack's.
        repo: user/repo that it will be at.
        base: Hub id of the base model.
    """
    card = header.card
    title = card.name or repo.rpartition("/")[2]
    use = f"""\
```python
import graftllm, transformers

model = transformers.AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
with graftllm.plug(model, graftllm.SkillPack.load("{repo}")):
    ...  # the model has the skill here, and its old bits back afterwards
```

```sh
hf download {base} --local-dir base
graftllm apply --base base --pack {repo} --out tuned   # an ordinary checkpoint
```"""
    parts = [
        _front_matter(title, base, {"": header}),
        MARK,
        f"# {_line(title)}",
        _line(card.description) or "A SkillPack: the compressed difference between a fine-tune and its base.",
        "```text\n" + "\n".join(_line(line) for line in pack_lines(header, file_bytes(header))[1:]) + "\n```",
        "## How to use it",
        use,
        "## What is inside",
        _table(role_grid(header)),
    ]
    return "\n\n".join(parts) + "\n"


def grafted_card(manifest: Manifest, headers: Mapping[str, Header], repo: str, base: str) -> str:
    """Return the README.md of a repository with a grafted model.

    Args:
        manifest: what the model consists of.
        headers: those of its packs, by name.
        repo: user/repo that it will be at.
        base: Hub id of the base model.
    """
    rows = [
        [name, f"{file_bytes(one):,}", _line(one.card.description), _line(one.card.license) or "not recorded"]
        for name, one in headers.items()
    ]
    chosen = "A router picks the pack for each prompt." if manifest.router else "Packs are chosen by name."
    title = repo.rpartition("/")[2]
    parts = [
        _front_matter(title, base, headers),
        MARK,
        f"# {_line(title)}",
        f"{_counted(len(headers))} of [{base}](https://huggingface.co/{base}), which stays as it is. {chosen}",
        _table(Grid("", ("pack", "bytes", "what it does", "license"), rows)),
        "## How to use it",
        f"```sh\ngraftllm pull {repo} --out {title}\ngraftllm chat {title}\ngraftllm serve {title}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(title: str, base: str, headers: Mapping[str, Header]) -> str:
    licenses = {header.card.license.strip() for header in headers.values()}
    scores = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_slug(name) or "skill",
            dataset_name=_line(": ".join(filter(None, (pack, name)))),
            metric_type="accuracy",
            metric_value=value,
        )
        for pack, header in headers.items()
        for name, value in header.card.scores.items()
    ]
    license, license_name = _license(licenses.pop() if len(licenses) == 1 else "")
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="graftllm",
        pipeline_tag="text-generation",
        tags=["graftllm", "skillpack", "delta-compression"],
        model_name=_line(title),
        eval_results=scores or None,
        license=license,
        license_name=license_name,
    )
    return f"---\n{data.to_yaml()}\n---"


def _counted(packs: int) -> str:
    return "One skill, as a pack" if packs == 1 else f"{packs} skills, as packs"


def _license(text: str) -> tuple[str | None, str | None]:
    """Return the licence and its own name as the Hub wants them; nothing where packs record none or different ones."""
    if not text:
        return None, None
    return (text.lower(), None) if text.lower() in _KNOWN_LICENSES else ("other", _slug(text) or "other")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def _line(text: str) -> str:
    """Return a text of a header as one line that no markup of ours can end in."""
    return " ".join(text.replace("`", "'").split())


def _table(grid: Grid) -> str:
    lines: list[Sequence[str]] = [grid.columns, ["---"] * len(grid.columns), *grid.rows]
    return "\n".join("| " + " | ".join(one.replace("|", "\\|") for one in line) + " |" for line in lines)
