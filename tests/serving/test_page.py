import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from graftllm.serving.app import build_app
from graftllm.serving.server import Local
from tests.serving.conftest import Expected
from tests.serving.running import PATIENCE_S, served

CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as Debian's package")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address: str) -> Iterator[Page]:
    page: Page = browser.new_page()
    page.set_default_timeout(PATIENCE_S * 1000)
    expect.set_options(timeout=PATIENCE_S * 1000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    expect(page.locator("#left option")).to_have_count(5)
    yield page
    assert faults == []
    page.close()


def _answer(page: Page, side: int = 0):
    return page.locator(f"#side-{side} .answer").last


def _say(page: Page, text: str) -> None:
    page.locator("#tokens").fill("10")
    page.locator("#question").fill(text)
    page.locator("#question").press("Enter")
    expect(page.locator("#send")).to_be_visible()


def test_auto_answers_and_shows_what_the_router_thought(page: Page, expected: Expected) -> None:
    assert page.locator("#left").input_value() == "auto"
    expect(page.locator("#key")).to_be_hidden()
    _say(page, "31676 4")
    expect(_answer(page).locator(".who b")).to_have_text("one")
    assert _answer(page).locator("> span").nth(1).text_content() == expected("31676 4", "one", 10)
    expect(_answer(page).locator("meter")).to_have_count(4)
    expect(_answer(page).locator(".bars span").first).to_have_text("one")
    expect(page.locator("#question")).to_be_focused()


def test_a_pack_is_chosen_and_a_conversation_goes_on_until_new(page: Page, expected: Expected) -> None:
    page.locator("#left").select_option("two")
    _say(page, "b")
    assert _answer(page).locator("> span").nth(1).text_content() == expected("b", "two", 10)
    _say(page, "b")
    expect(page.locator(".user")).to_have_count(2)
    page.locator("#new").click()
    expect(page.locator(".turn")).to_have_count(0)
    _say(page, "b")
    assert _answer(page).locator("> span").nth(1).text_content() == expected("b", "two", 10)


def test_two_packs_answer_side_by_side(page: Page, expected: Expected) -> None:
    page.locator("#compare").check()
    page.locator("#left").select_option("one")
    page.locator("#right").select_option("whole")
    _say(page, "hello there")
    for side, pack in enumerate(("one", "whole")):
        expect(_answer(page, side).locator(".who b")).to_have_text(pack)
        assert _answer(page, side).locator("> span").nth(1).text_content() == expected("hello there", pack, 10)


def test_an_error_is_shown(page: Page) -> None:
    page.locator("#left").select_option("one")
    _say(page, "a" * 300)
    expect(page.get_by_role("alert")).to_contain_text("expected prompt and answer to have at most 256 tokens together")


def test_a_card_opens_and_closes_by_the_keyboard(page: Page) -> None:
    page.locator("#left").select_option("one")
    page.locator("#card").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("caption")).to_have_text(["By role", "By layer"])
    expect(dialog).to_contain_text(re.compile(r"bytes, of a [\d,]+ byte fine-tune"))
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_escape_stops_an_answer(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
    page.locator("#question").fill("b")
    page.locator("#question").press("Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("(stopped)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(page: Page, scheme) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#compare").check()
    _say(page, "31676 4")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(25, 25, 24)")


def test_a_key_is_asked_for_where_one_is_needed(browser, backend: Local) -> None:
    app = build_app(backend, api_key="secret")
    app_without_end = _Unending(app)
    with served(app_without_end) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#key")).to_be_visible(timeout=PATIENCE_S * 1000)
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#left option")).to_have_count(5, timeout=PATIENCE_S * 1000)
        page.close()


class _Unending:
    """An application that leaves its backend alone when it ends: others use that, too."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            for done in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": done})
        else:
            await self.app(scope, receive, send)
