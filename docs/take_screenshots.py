"""Take pictures of the page of a running `graftllm serve`: python docs/take_screenshots.py GRAFTED OUT_DIRECTORY.

Needs Playwright and a Chromium of the machine's own. `docs/images/serve-page.png` is its `compare.png`, of the grafted
model that `make demo` leaves in runs/demo/grafted.
"""

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError

from playwright.sync_api import Page, sync_playwright

QUESTION = "sort the letters: GRAFT"
DESKTOP, PHONE = (1000, 520), (390, 760)


def main(grafted: Path, out: Path) -> None:
    """Serve a grafted model, look at its page in several ways, and keep what was seen."""
    out.mkdir(parents=True, exist_ok=True)
    views: dict[str, tuple[tuple[int, int], str, Callable[[Page], None]]] = {
        "desktop-light": (DESKTOP, "light", _talk),
        "desktop-dark": (DESKTOP, "dark", _talk),
        "phone": (PHONE, "light", _talk),
        "compare": (DESKTOP, "light", _compare),
        "compare-phone": (PHONE, "dark", _compare),
        "card": (DESKTOP, "light", _card),
    }
    with _served(grafted) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, ((width, height), scheme, act) in views.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_selector("#left option", state="attached")
            act(page)
            page.screenshot(path=out / f"{name}.png")
            page.close()
        browser.close()


def _talk(page: Page) -> None:
    page.locator("#tokens").fill("24")
    page.locator("#question").fill(QUESTION)
    page.locator("#question").press("Enter")
    page.wait_for_selector(".answer .who b")
    page.wait_for_selector("#send", state="visible")


def _compare(page: Page) -> None:
    page.locator("#compare").check()
    page.locator("#right").select_option("base")
    _talk(page)


def _card(page: Page) -> None:
    page.locator("#left").select_option("sort")
    page.locator("#card").click()
    page.wait_for_selector("dialog table")


@contextmanager
def _served(grafted: Path) -> Iterator[str]:
    """Run the command until the block ends; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "graftllm.cli", "serve", str(grafted), "--port", str(port)])
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except URLError:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
