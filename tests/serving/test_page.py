"""The page of pipeline/serving/page.html in Debian's chromium: one click, two images, nothing from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
WIDTHS = (1200, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if not CHROMIUM:
        pytest.skip("chromium, which shows the page, is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_click_shows_both_images(browser: sync_api.Browser, server: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.set_default_timeout(60_000)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server)
    page.get_by_role("radio", name="2").check(force=True)
    page.get_by_label("Steps").select_option("2 steps (1, 2)")
    page.get_by_role("button", name="Draw", exact=True).click()
    for name in ("Student", "Teacher"):
        image = page.get_by_role("img", name=f"{name}: class 2, seed 0")
        image.wait_for()
        assert image.evaluate("image => image.naturalWidth") == 6
    page.get_by_text("Drawn.").wait_for()
    for name in ("student", "teacher"):
        assert page.locator(f"#{name} .figure").inner_text().endswith(" ms")
    assert {url.removeprefix(server).split(",")[0] for url in asked} <= {
        "/",
        "/health",
        "/images",
        "data:image/png;base64",
        "data:",
    }
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    page.close()


def test_the_keyboard_is_enough_and_a_refusal_is_shown(browser: sync_api.Browser, server: str) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(server)
    page.get_by_role("radio", name="0").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "seed"
    page.keyboard.press("Enter")
    page.get_by_role("img", name="Student: class 1, seed 0").wait_for()
    page.get_by_text("Drawn.").wait_for()
    page.route("**/images", lambda route: route.fulfill(status=422, json={"error": "label 1 is gone."}))
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_role("alert").get_by_text("label 1 is gone.").wait_for()
    unnamed = "[...document.querySelectorAll('input,select,textarea')].filter(one => !one.labels.length).length"
    assert page.evaluate(unnamed) == 0
    page.close()
