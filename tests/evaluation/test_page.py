import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

from graftllm.delta import Delta
from graftllm.errors import PackError, RecordError, StorageError
from graftllm.evaluation.ledger import read_ledger
from graftllm.evaluation.page import write_page
from graftllm.fusion.assembly import fuse_packs
from graftllm.header import Card, Overhead
from graftllm.packer import compress
from graftllm.packing_options import PackOptions

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = '<script>alert(1)</script>&"'


class Elements(HTMLParser):
    """The tags of a page, with their attributes; tags that stay open are a mistake."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _stage(run: Path, name: str, result: object) -> None:
    stamp = {"name": name, "key": "0" * 64, "result": result, "seconds": 90.0, "peak_memory_bytes": 10**9, "later": 1}
    (run / "stages").mkdir(parents=True, exist_ok=True)
    (run / "stages" / f"{name}.json").write_text(json.dumps(stamp))


def _score(value: float, n: int = 100, task: str = "all") -> dict[str, object]:
    return {task: {"value": value, "n": n}}


@pytest.fixture(scope="module")
def run(delta: Delta, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of the skills `one` and `two` leaves behind, with texts that would like to be more than texts."""
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(f"name: '{EVIL}'\nseed: 5\nskills: {{one: {{x: '{EVIL}'}}, two: {{}}}}\n")
    general = _score(1.0) | _score(0.5, task=EVIL)
    _stage(run, "evaluate.base", {"one": _score(0.0), "two": _score(0.25), "general": general})
    _stage(run, "evaluate.source.one.a", {"one": _score(0.5)})
    _stage(run, "evaluate.source.one.b", {"one": _score(0.75)})
    for name in ("tuned.one", "sequential.one"):
        _stage(run, f"evaluate.{name}", {"one": _score(1.0), "two": _score(0.1), "general": general})
    _stage(run, "evaluate.sequential.two", {"one": _score(0.02), "two": _score(1.0), "general": general})
    _stage(run, "evaluate.routed", {"one": _score(0.99), "two": _score(0.98), "general": general})
    _stage(run, "routes", {"one": {"one": 99, "base": 1}, "general": {"base": 100}})
    _stage(run, "unplug", True)
    _stage(run, "verify.one", {"kl": 0.0123, "top1_agreement": 0.999, "tokens": 4321})
    packs = {}
    for name in ("two", "one"):
        card = Card(
            name=name, description=EVIL, license=EVIL, scores={EVIL: 0.5}, overheads={EVIL: Overhead(tokens=98765)}
        )
        packs[name] = run / "packs" / f"{name}.safetensors"
        compress(delta, PackOptions(strategy="paper"), card=card).save(packs[name])
    fuse_packs(run / "grafted", str(base_dir), packs)
    source = {"responses": 10, "right": 7, "sft_rows": 5, "pairs": 2, "mean_grade": None}
    (run / "skills" / "one").mkdir(parents=True)
    (run / "skills" / "one" / "data-card.json").write_text(json.dumps({"skill": "one", "sources": {EVIL: source}}))
    (run / "plots").mkdir()
    Figure(figsize=(1, 1)).savefig(run / "plots" / "scores.png")
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    write_page(run, run / "run.html")
    return (run / "run.html").read_text()


def test_a_page_needs_nothing_beside_it_and_runs_nothing(page: str) -> None:
    elements = Elements(page).found
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
    assert "url(" not in page and "@import" not in page
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in page


def test_everything_that_a_stranger_wrote_is_text(page: str) -> None:
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;") >= 10


@pytest.mark.parametrize(
    "shown",
    [
        "Seed 5",
        "<b>2 packs</b>",
        "<b>99.5%</b>of 200 test prompts routed right",
        "<b>Bit for bit</b>",
        "75.0 ± 4.3",  # the better of two sources
        "fine-tuned after two",
        "packs, routed",
        '<td class="share" style="--v:99.0%">99</td>',  # where the router sent `one`
        "<dt>KL to tuned</dt><dd>0.0123 nats a token, on 4,321 tokens</dd>",
        '<td class="share" style="--v:70.0%">70.0%</td>',  # right responses
        "<td>98,765</td>",  # tokens of a stage, from the pack's header
        "<dt>router</dt><dd>none</dd>",
        "Score of each skill: base, source, tuned, pack, routed",
    ],
)
def test_a_page_shows(page: str, shown: str) -> None:
    assert shown in page


def test_packs_stand_in_the_order_of_the_skills(run: Path, page: str) -> None:
    assert list(read_ledger(run).packs) == ["one", "two"]
    assert page.index("<h3>one: ") < page.index("<h3>two: ")


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run" / "stages").mkdir(parents=True)
    write_page(tmp_path / "run", tmp_path / "empty.html")
    assert "<h1>run</h1>" in (tmp_path / "empty.html").read_text()
    _stage(tmp_path / "run", "sample.one", {"a": 0})
    (tmp_path / "run" / "stages" / "score.one.started").touch()
    write_page(tmp_path / "run", tmp_path / "begun.html")
    text = (tmp_path / "begun.html").read_text()
    assert "Begun and not finished: score.one." in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["Costs"]
    assert "1 min 30 s" in text


def test_what_is_no_run_or_damaged_is_one_line_and_no_page(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    with pytest.raises(
        RecordError, match="expected the directory of a run, found no stages in it; give what --dir was"
    ):
        write_page(tmp_path / "none", out)
    with pytest.raises(StorageError, match="expected a name that ends in .html; found '.txt'"):
        write_page(run, tmp_path / "run.txt")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "packs" / "one.safetensors").write_bytes(b"no pack")
    with pytest.raises(PackError, match="truncated or not a SkillPack"):
        write_page(broken, out)
    _stage(broken, "evaluate.base", {"one": {"all": {"value": "high"}}})
    with pytest.raises(RecordError, match="not what a run writes there .result.one.all.value: .* delete it and run"):
        write_page(broken, out)
    (broken / "recipe.yaml").write_text("skills: [")
    with pytest.raises(RecordError, match="recipe.yaml: not what a run writes there"):
        write_page(broken, out)
    assert not out.exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as Debian's package")
def test_a_browser_shows_the_page_on_a_phone_without_complaint(run: Path, page: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        complaints: list[str] = []
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("request", lambda request: complaints.append(request.url) if request.url[:5] == "http:" else None)
        shown.goto((run / "run.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == 360
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 25, 24)"
        assert shown.locator("img").evaluate_all("all => all.filter(one => !one.naturalWidth).length") == 0
        browser.close()
    assert complaints == []
