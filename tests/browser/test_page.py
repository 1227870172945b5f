"""The report in a real browser: nothing is loaded, nothing goes wrong, and every control does what it says."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualhead.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from test_report import evaluation, gallery, make_run  # folders as training and evaluation leave them

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is tried")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not tried in a browser"),
]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Opens a file, and fails the test for anything that the page complains of or asks for."""
    contexts, complaints = [], []

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("data:", "blob:")) or request.url == Path(path).as_uri()
            or complaints.append(f"request for {request.url[:80]}"),
        )  # fmt: skip
        page.goto(Path(path).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report([make_run(folder / "run", images=True, attacks=("pgd-40", "cw"))], folder / "report.html")


def cards(page):
    return page.locator(".card:visible")


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_nothing_is_wider_than_the_window(opened, report, viewport, colours):
    page = opened(report, viewport=viewport, color_scheme=colours)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_tables_sort_by_number_and_back(opened, report):
    page = opened(report)
    head = page.locator("#accuracy thead th").nth(1)
    values = "rows => rows.map(row => Number(row.cells[1].dataset.order))"
    head.locator("button").click()
    up = page.locator("#accuracy table").first.locator("tbody tr").evaluate_all(values)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    down = page.locator("#accuracy table").first.locator("tbody tr").evaluate_all(values)
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)


def test_everything_can_be_reached_and_used_by_keyboard(opened, report):
    page = opened(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    head = page.locator("#accuracy thead th").nth(1)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    slider = page.locator("[data-filter=step]")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator(".filters .eps").inner_text() == "0 (clean)"
    assert slider.get_attribute("aria-valuetext") == "eps 0 (clean)"
    unnamed = "nodes => nodes.filter(n => !(n.innerText || n.ariaLabel || n.labels?.length)).map(n => n.outerHTML)"
    assert page.locator("button:visible, a:visible, select:visible, input:visible").evaluate_all(unnamed) == []


def attacked(page, number):
    """Levels [H, W, 3] of the picture that a card has put together."""
    canvas = page.locator(".card canvas").nth(number)
    canvas.scroll_into_view_if_needed()
    canvas.wait_for(state="visible")
    data = canvas.evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))


def test_the_slider_shows_the_stored_images_and_answers(opened, report):
    stored = dict(np.load(report.parent / "run" / "evaluation" / "gallery.npz"))
    page = opened(report)
    slider, target = page.locator("[data-filter=step]"), page.locator("[data-filter=target]")
    for chosen, step in ((2, 1), (2, 0), (0, 1), (1, 0)):
        target.select_option(str(chosen))
        slider.fill(str(step + 1))
        for row in (0, 7):
            expected = stored["adversarial"][chosen, step, row].transpose(1, 2, 0)
            page.wait_for_timeout(200)
            np.testing.assert_array_equal(attacked(page, row), expected)
            wrong = page.locator(".card").nth(row).locator(".opinions li").evaluate_all(
                "rows => rows.map(row => row.classList.contains('wrong'))"
            )  # fmt: skip
            assert wrong == (stored["margin"][chosen, step, row] <= 0).tolist()
    slider.fill("0")
    page.wait_for_timeout(200)
    np.testing.assert_array_equal(attacked(page, 3), stored["original"][3].transpose(1, 2, 0))


def test_the_slider_comes_back_from_clean_images_of_one_output(opened, tmp_path):
    run = make_run(tmp_path / "run")
    gallery(run / "evaluation", outputs=("model",))
    write_report([run], tmp_path / "report.html")
    stored = dict(np.load(run / "evaluation" / "gallery.npz"))
    page = opened(tmp_path / "report.html")
    slider = page.locator("[data-filter=step]")
    for step in (0, 1, 2):
        slider.fill(str(step))
        page.wait_for_timeout(200)
        expected = stored["adversarial"][0, step - 1, 3] if step else stored["original"][3]
        np.testing.assert_array_equal(attacked(page, 3), expected.transpose(1, 2, 0))
        assert "not stored" not in page.locator(".filters .eps").inner_text()


def test_names_of_outputs_leave_room_for_the_classes(opened, tmp_path):
    run = make_run(tmp_path / "run")
    gallery(run / "evaluation", outputs=("head 1", "head 2", "mean of heads"))
    write_report([run], tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    names = page.locator(".opinions .who")
    assert "mean of heads" in names.all_text_contents()
    assert names.evaluate_all("all => all.every(one => one.scrollWidth <= one.clientWidth)")


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("-*+", lambda right: ~right[:, 0] & right[:, 2]),
        ("--+", lambda right: ~right[:, 0] & ~right[:, 1] & right[:, 2]),
        ("+*-|*+-", lambda right: (right[:, 0] | right[:, 1]) & ~right[:, 2]),
        ("---", lambda right: ~right.any(1)),
    ],
)
def test_outcomes_choose_what_they_say(opened, report, pattern, rule):
    stored = dict(np.load(report.parent / "run" / "evaluation" / "gallery.npz"))
    expected = rule(stored["margin"][-1, -1] > 0)
    page = opened(report)
    page.locator("[data-filter=outcome]").select_option(pattern)
    assert page.locator(".filters .count").inner_text() == f"{expected.sum()} of 12 shown"
    shown = page.locator(".card").evaluate_all("cards => cards.map(card => !card.hidden)")
    assert shown == expected.tolist()
    page.locator("[data-filter=label]").select_option("class 1")
    assert cards(page).count() == (expected & (stored["label"] == 1)).sum()


def test_outcomes_say_how_many_there_are(opened, report):
    right = np.load(report.parent / "run" / "evaluation" / "gallery.npz")["margin"][-1, -1] > 0
    page = opened(report)
    told = page.locator("[data-filter=outcome] option").all_inner_texts()
    assert "all (12)" in told
    assert f"head 1 fails, aggregate of heads holds ({(~right[:, 0] & right[:, 2]).sum()})" in told
    page.locator("[data-filter=label]").select_option("class 1")
    assert "all (3)" in page.locator("[data-filter=outcome] option").all_inner_texts()


def test_one_image_can_be_looked_at_closely_and_the_next_one_too(opened, report):
    stored = dict(np.load(report.parent / "run" / "evaluation" / "gallery.npz"))
    page = opened(report)
    page.get_by_role("button", name="Look closer at sample 3").press("Enter")
    dialog = page.get_by_role("dialog")
    for sample in (3, 4, 3):
        assert dialog.get_attribute("aria-label").startswith(f"Sample {sample},")
        page.wait_for_timeout(200)
        data = dialog.locator("canvas").evaluate("canvas => canvas.toDataURL()")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))
        np.testing.assert_array_equal(pixels, stored["adversarial"][-1, -1, sample].transpose(1, 2, 0))
        wrong = dialog.locator("td:last-child").evaluate_all("all => all.map(one => one.classList.contains('wrong'))")
        assert wrong == (stored["margin"][-1, -1, sample] <= 0).tolist()
        page.keyboard.press("ArrowRight" if sample == 3 else "ArrowLeft")
    page.get_by_role("slider").last.fill("0")
    assert dialog.locator(".wrong").count() == (stored["clean_margin"][4] <= 0).sum()
    assert page.locator("[data-filter=step]").input_value() == "0"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.className") == "closer"  # where the reader was


def test_tables_are_copied_as_they_stand(opened, report):
    page = opened(report, permissions=["clipboard-read", "clipboard-write"])
    table = page.locator("#accuracy .scroll table").first
    cells = table.evaluate("t => [...t.rows].map(r => [...r.cells].map(c => c.innerText.replace(/[\u2195]/g, '')))")
    names = [row[0].strip() for row in cells[1:]]
    for kind, first in (("Markdown", "| model |"), ("LaTeX", "\\begin{tabular}{lr")):
        page.get_by_role("button", name=f"Copy {kind}").first.click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.startswith(first) and all(name in copied for name in names)
        counts = {
            line.count("&" if kind == "LaTeX" else "|") for line in copied.splitlines() if "%" in line or "[" in line
        }
        assert len(counts) == 1


def test_tables_say_that_they_scroll_on_a_phone_alone(opened, report):
    wide, narrow = (opened(report, viewport=viewport) for viewport in (DESKTOP, {**PHONE, "width": 320}))
    for page, hints in ((wide, 0), (narrow, 1)):
        page.wait_for_timeout(200)
        assert (page.locator("#accuracy .scroll-hint:visible").count() >= 1) == bool(hints)


def test_figures_and_numbers_are_saved_as_files(opened, report, tmp_path):
    page = opened(report, accept_downloads=True)
    figure = page.locator("figure").first
    figure.scroll_into_view_if_needed()
    figure.hover()
    for kind, head in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as waited:
            figure.get_by_role("button", name=f"Save figure as {kind}").click()
        waited.value.save_as(tmp_path / kind)
        content = (tmp_path / kind).read_bytes()
        assert content.startswith(head)
        assert b"var(" not in content  # a saved figure does not refer to colours that only the page knows
    for kind in ("CSV", "JSON"):
        with page.expect_download() as waited:
            page.get_by_text(f"Save {kind}").click()
        waited.value.save_as(tmp_path / f"results.{kind.lower()}")
    numbers = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "results.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(numbers) == len(listed) == 5
    for number, row in zip(numbers, listed, strict=True):
        assert row["model"] == number["model"]
        assert float(row["clean"]) == number["clean"]
        assert float(row["worst"]) == number["worst"]


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_runs_stand_side_by_side_and_apart(opened, tmp_path, viewport):
    runs = [make_run(tmp_path / name, seed=10 * seed, images=True) for seed, name in enumerate("abc")]
    page = opened(write_report(runs, tmp_path / "report.html"), viewport=viewport)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#accuracy table").first.locator("tbody tr").count() == 15
    assert page.locator("nav a").all_inner_texts()[3:6] == ["a", "b", "c"]
    galleries = page.locator(".gallery")
    assert galleries.count() == 3
    galleries.nth(1).locator("[data-filter=step]").fill("0")  # what one gallery shows is no matter of the others
    galleries.nth(1).locator("[data-filter=label]").select_option("class 2")
    assert [galleries.nth(n).locator(".card:visible").count() for n in range(3)] == [12, 3, 12]
    assert galleries.nth(0).locator(".filters .eps").inner_text() == "0.1"
    galleries.nth(2).locator(".closer").nth(5).click()
    assert page.get_by_role("dialog").get_attribute("aria-label").startswith("Sample 5,")


def test_light_and_dark_differ_and_both_can_be_read(opened, report):
    def luminance(colour):
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    grounds = set()
    for scheme in ("light", "dark"):
        page = opened(report, color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.querySelector('main > section')).backgroundColor")
        grounds.add(ground)
        for selector in (".sentence", ".lead", ".opinions .who", ".opinions .wrong .what", "nav a", ".count"):
            colour = page.locator(selector).first.evaluate("node => getComputedStyle(node).color")
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{selector} in {scheme}"
    assert len(grounds) == 2


def test_it_prints_whole(opened, report, tmp_path):
    page = opened(report)
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(500)
    assert page.locator(".filters:visible, nav:visible, .button:visible").count() == 0
    assert page.locator("details").evaluate_all("all => all.every(one => one.open)")
    assert page.locator(".card canvas:visible").count() == 12
    assert page.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")


def test_without_scripts_the_page_still_speaks(opened, report):
    page = opened(report, java_script_enabled=False)
    assert "aggregate of heads still gets" in page.locator(".sentence").inner_text()
    assert page.locator(".card .clean").count() == 12
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert page.locator(".filters:visible").count() == 0


def test_five_hundred_images_are_light_and_quick(opened, tmp_path):
    evaluation(tmp_path / "one", 3)
    gallery(tmp_path / "one", count=500, side=32, smooth=True, eps=(4 / 255, 8 / 255))
    path = write_report([tmp_path / "one"], tmp_path / "report.html")
    assert path.stat().st_size < 5_000_000
    times = []
    for _ in range(3):  # the quickest: a busy machine says nothing of the page
        page = opened(path)
        times.append(
            page.evaluate(
                """new Promise(done => new PerformanceObserver(list => list.getEntries().forEach(
                  entry => entry.name === "first-contentful-paint" && done(entry.startTime)
                )).observe({type: "paint", buffered: true}))"""
            )
        )
    assert 0 < min(times) < 1000  # ms
    assert cards(page).count() == 12
    page.get_by_role("button", name="Show 48 more").click()
    assert cards(page).count() == 60
    page.locator("[data-filter=outcome]").select_option("-*+")
    found = int(page.locator(".filters .count").inner_text().split()[0])
    assert 60 < found < 500
    while page.locator(".more:visible").count():
        page.locator(".more button").click()
    assert cards(page).count() == found
    page.locator("[data-filter=outcome]").select_option("")
    assert cards(page).count() == 12
    page.emulate_media(media="print")
    assert cards(page).count() == 500  # paper has no button for more


HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "\N{OWL} \N{FAMILY} & \"quoted\" 'x'",
    "n" * 200,
    "</script><img src=x onerror=document.title='taken'>",
]


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_hostile_class_names_are_words(opened, tmp_path, viewport):
    run = make_run(tmp_path / "run", names=HOSTILE, images=True)
    (run / "checkpoints" / "config.json").write_text(json.dumps({"class_names": HOSTILE}))
    page = opened(write_report([run], tmp_path / "report.html"), viewport=viewport)
    page.locator("[data-filter=step]").fill("1")
    assert "taken" not in page.title()
    assert page.locator("script").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in HOSTILE:
        page.locator("[data-filter=label]").select_option(name)
        assert cards(page).count() == 3
        assert cards(page).first.locator(".labels span").first.text_content() == name


@pytest.mark.parametrize("classes", [2, 1000])
def test_two_and_a_thousand_classes(opened, tmp_path, classes):
    run = tmp_path / "run"
    evaluation(run, 1, classes=classes, count=2 * classes, images=True)
    page = opened(write_report([run], tmp_path / "report.html"), viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator(".card").count() == 12


def test_what_was_not_finished_says_so(opened, tmp_path):
    begun = make_run(tmp_path / "begun", finished=0, lines=[], evaluated=False)
    broken = make_run(tmp_path / "nan", lines=[{"stage": "main_head", "epoch": 1, "loss": float("nan")}])
    page = opened(write_report([begun, broken], tmp_path / "report.html"))
    notes = " ".join(page.locator(".notes").all_inner_texts())
    for words in ("no epoch has been finished", "not been evaluated", "not finite"):
        assert words in notes


def test_accuracies_of_long_names_need_no_scrolling_on_a_phone(opened, tmp_path):
    runs = [make_run(tmp_path / name, attacks=("pgd-40",)) for name in ("digits_guided_distillation", "digits_base")]
    page = opened(write_report(runs, tmp_path / "report.html"), viewport=PHONE)
    assert page.locator("#accuracy .scroll").first.evaluate("node => node.scrollWidth <= node.clientWidth")
    name = page.locator("#accuracy tbody th").first
    words = "node => { const at = document.createRange(), text = node.firstChild; at.selectNode(text);"
    assert name.evaluate(words + " return at.getClientRects().length; }") == 1  # `digits_`, in one piece
