import re
from pathlib import Path

import graftllm

DOCS = Path(__file__).parents[1] / "docs"


def test_the_python_page_has_every_public_name_and_no_other() -> None:
    found = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = {name: getattr(graftllm, name) for name in graftllm.__all__}
    assert sorted(found) == sorted(f"{one.__module__}.{one.__qualname__}" for one in public.values())


def test_pictures_are_small_and_all_are_shown() -> None:
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    shown = {
        Path(name).name for page in pages for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    for picture in (DOCS / "images").iterdir():
        assert picture.name in shown
        assert picture.stat().st_size < 300_000, picture
