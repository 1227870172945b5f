"""The page to play with in a real browser: an image is turned into another class."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch

from dualhead.commands.play import FILM, Playground, serve
from dualhead.data import Split
from helpers.evaluation import THREAT, patterns, trained

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is tried")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not tried in a browser"),
]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
NAMES = ("apple", "bee", "cat with a long name", "dog")


@pytest.fixture(scope="module")
def address():
    images, labels = patterns(12)
    server = serve(Playground(trained(), Split(images, labels, NAMES), THREAT, count=8))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(address, request):
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=getattr(request, "param", DESKTOP))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.locator("#says tr").first.wait_for()
        yield page
        browser.close()
    assert not complaints


def turn_into(page, name):
    page.locator("#to").select_option(label=name)
    page.locator("#turn").click()
    page.locator("#turned").wait_for(state="visible")
    sync_api.expect(page.locator("#turn-state")).to_have_text("")


@pytest.mark.parametrize("page", [PHONE, DESKTOP], ids=["phone", "desktop"], indirect=True)
def test_an_image_is_turned_into_each_class(page):
    sync_api.expect(page.locator("#turned")).to_be_hidden()
    assert page.locator("#to option").all_inner_texts() == list(NAMES)
    page.locator("#radius").fill("200")
    shown = set()
    for name in NAMES:
        turn_into(page, name)
        sync_api.expect(page.locator("#turned-class")).to_have_text(name)
        row = page.locator("#turned-says tr").first
        assert name in row.inner_text()
        assert row.locator("td").nth(1).get_attribute("class") == "right"
        assert page.locator(".film img").count() == FILM
        assert page.locator(".film img").last.get_attribute("src") == page.locator("#turned-image").get_attribute("src")
        assert (
            0 <= float(page.locator("#distance").inner_text()) <= 2 * float(page.locator("#radius-text").inner_text())
        )
        shown.add(page.locator("#turned-image").get_attribute("src"))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert len(shown) == len(NAMES)


def test_what_was_turned_goes_with_its_image(page):
    turn_into(page, "dog")
    first = page.locator(".film img").first.get_attribute("src")
    page.locator(".strip button").nth(3).click()
    sync_api.expect(page.locator("#turned")).to_be_hidden()
    turn_into(page, "dog")
    assert page.locator(".film img").first.get_attribute("src") != first


def test_it_is_used_by_keyboard(page):
    page.locator("#to").focus()
    page.keyboard.press("ArrowDown")
    page.locator("#turn").focus()
    page.keyboard.press("Enter")
    page.locator("#turned").wait_for(state="visible")
    sync_api.expect(page.locator("#turned-class")).to_have_text(NAMES[1])
    assert torch.isfinite(torch.tensor(float(page.locator("#distance").inner_text())))
