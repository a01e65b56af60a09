"""What mkdocs does besides: pages of files outside docs/, and a look that no page loads anything from elsewhere."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "readme.md",
    "LOG.md": "log.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
RECIPES = "recipe-files.md"
_LOADED = re.compile(r"<(?:(?:script|img|iframe|source)\b[^>]*\bsrc|link\b[^>]*\bhref)=[\"']?(?:https?:)?//")


def on_config(config: Any) -> Any:
    """Put the files outside docs/ into the navigation."""
    config.nav.append({"Project": [*PAGES.values(), RECIPES]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file in `PAGES`, and one with every recipe."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    parts = ["# Recipe files\n"]
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        parts.append(f"## {recipe.name}\n\n```yaml\n{recipe.read_text(encoding='utf-8')}```\n")
    files.append(File.generated(config, RECIPES, content="\n".join(parts)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    up = "../" * page.file.src_uri.count("/")

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if path in PAGES:
            return f"]({up}{PAGES[path]}{anchor})"
        if path.startswith("recipes/") and path.endswith(".yaml"):
            return f"]({up}{RECIPES}#{Path(path).name.replace('.', '')})"
        return f"]({up}{RECIPES})" if path.rstrip("/") == "recipes" else f"]({up}{path.removeprefix('docs/')}{anchor})"

    inside = page.file.src_uri in PAGES.values()
    start = "" if inside else re.escape("../" + up)
    if inside:  # links of the README and its neighbors start at the root
        return re.sub(r"\]\((?P<path>(?!https?:|#)[^)#]+)(?P<anchor>#[^)]*)?\)", link, markdown)
    return re.sub(rf"\]\({start}(?P<path>[^)#.][^)#]*)(?P<anchor>#[^)]*)?\)", link, markdown)


def on_post_build(config: Any) -> None:
    """Fail if a page would load anything over the network."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        found = _LOADED.search(page.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{page.name}: loads something from elsewhere: {found[0]}")
