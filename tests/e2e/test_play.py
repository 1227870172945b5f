"""The page to play with: it answers to this machine only, and what it shows is the model's own."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dualhead.commands.play import FILM, HALVINGS, Playground, check_beside, serve
from dualhead.commands.resolve import Request, resolve
from dualhead.data import Framing, Split, load_split
from dualhead.errors import UserError
from dualhead.evaluation import counterfactual
from dualhead.report import picture
from dualhead.threats import ThreatModel
from helpers.e2e import dualhead

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def playground(finished_run):
    shown = resolve(Request(model=str(finished_run), device="cpu"))
    return Playground(shown.model, shown.images, shown.threat, count=48)


@pytest.fixture
def server(playground):
    started = serve(playground)
    thread = threading.Thread(target=started.serve_forever)
    thread.start()
    yield started
    started.shutdown()
    thread.join()
    started.server_close()


def ask(server, method, path, content=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = None if content is None else json.dumps(content)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_an_attack_says_what_every_output_makes_of_it(server, playground):
    status, body = ask(server, "POST", "/attack", {"sample": 3, "eps": 0.2})
    assert status == 200
    found = json.loads(body)
    assert (
        found["outputs"]
        == ["head 1", "head 2", "aggregate of heads"]
        == [target["name"] for target in found["targets"]]
    )
    x = playground.images.images[3:4].float() / 255
    with torch.no_grad():
        expected = [*playground.model.head_logits(x)[0], playground.model(x)[0]]
    names = playground.images.class_names
    assert [said["class"] for said in found["says"]] == [names[int(logits.argmax())] for logits in expected]
    shares = [float(logits.softmax(0).max()) for logits in expected]
    np.testing.assert_allclose([said["probability"] for said in found["says"]], shares, rtol=1e-4)
    label = int(playground.images.labels[3])
    assert all(
        said["right"] == (said["class"] == names[label]) for target in found["targets"] for said in target["says"]
    )


def test_an_image_of_ones_own_is_taken_for_what_the_model_says(server, playground):
    pixels = playground.images.images[5].permute(1, 2, 0).flatten().tolist()
    own = json.loads(ask(server, "POST", "/attack", {"pixels": pixels, "eps": 0.1, "label": None})[1])
    offered = json.loads(ask(server, "POST", "/attack", {"sample": 5, "eps": 0.1})[1])
    assert own["clean"] == offered["clean"]
    assert own["says"][-1]["right"]
    assert own["class"] == own["says"][-1]["class"]


def encoded(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("crop", [None, 0.5])
def test_a_picture_of_ones_own_comes_to_size_as_the_images_of_the_data_do(playground, tmp_path, crop):
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (40, 24), np.uint8), random.integers(0, 256, (9, 30), np.uint8)]
    own = Playground(playground.model, playground.images, playground.threat, Framing(crop=crop))
    for pixels in pictures:
        for part in ("a", "b"):
            (tmp_path / "train" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "train" / part / "0.png")
        expected = load_split(str(tmp_path), "train", image_size=(8, 8), crop=crop).images[0]
        assert own.picture({"file": encoded(pixels)})["pixels"] == expected.flatten().tolist()


def test_a_coloured_picture_is_grey_to_a_model_of_grey_images(server, playground):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    status, body = ask(server, "POST", "/picture", {"file": encoded(red)})
    assert (status, json.loads(body)["pixels"]) == (200, [76] * 64)  # 0.299 of 255
    for asked in ({"file": "?"}, {"file": 3}, {}, {"file": base64.b64encode(b"no image").decode()}):
        status, body = ask(server, "POST", "/picture", asked)
        assert status == 400
        assert json.loads(body)["error"]


def test_a_model_that_fails_or_answers_nothing_is_told(playground):
    class Silent(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), torch.nan) + 0 * x.sum()

    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("something of its own")

    asked = {"pixels": [1] * 64, "eps": 0.1, "label": None}
    with pytest.raises(UserError, match="logits for this image are not numbers"):
        Playground(Silent(), playground.images, playground.threat).attack(asked)
    started = serve(Playground(Broken(), playground.images, playground.threat))
    thread = threading.Thread(target=started.serve_forever)
    thread.start()
    try:
        status, body = ask(started, "POST", "/attack", asked)
    finally:
        started.shutdown()
        thread.join()
        started.server_close()
    assert status == 400
    assert "something of its own" in json.loads(body)["error"]


def test_on_the_usual_port_a_browser_names_none(server, monkeypatch):
    assert ask(server, "GET", "/offer", Host="127.0.0.1")[0] == 403
    monkeypatch.setattr("dualhead.commands.play.HTTP_PORT", server.server_port)
    assert ask(server, "GET", "/offer", Host="127.0.0.1")[0] == 200


@pytest.mark.parametrize(
    "asked", [[], {}, {"sample": 99, "eps": 0.1}, {"sample": 0, "eps": -1}, {"sample": 0, "eps": "x"},
              {"pixels": [1, 2], "eps": 0.1}, {"sample": 0}, {"sample": 0, "eps": 10**400}],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(server, asked):
    status, body = ask(server, "POST", "/attack", asked)
    assert status == 400
    assert json.loads(body)["error"]


def test_nobody_else_is_let_in(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "GET", "/offer", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/attack", {"sample": 0, "eps": 0.1}, Host="evil.example")[0] == 403
    plain = {"Content-Type": "text/plain"}
    assert ask(server, "POST", "/attack", {"sample": 0, "eps": 0.1}, **plain)[0] == 400
    assert ask(server, "GET", "/../pyproject.toml")[0] == 404


@pytest.mark.parametrize(
    ("number", "ignored"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_the_command_starts_answers_and_stops(finished_run, number, ignored):
    command = [sys.executable, "-m", "dualhead", "play", str(finished_run), "--device", "cpu", "--json"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: ignored and signal.signal(number, signal.SIG_IGN),  # noqa: PLW1509  # no threads here
    )
    try:
        address = json.loads(running.stdout.readline())["address"]
        port = int(re.search(r":(\d+)/", address)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert "Play with the model" in connection.getresponse().read().decode()
        running.send_signal(number)
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.wait()


def test_a_port_that_is_taken_is_named(server, finished_run):
    assert "--port" in dualhead("play", finished_run, "--port", server.server_port, "--device", "cpu").error_line


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the page is not tried in a browser")
def test_the_page_plays_in_a_browser(server, playground):
    with torch.no_grad():
        right = playground.model(playground.images.images[:48].float() / 255).argmax(1) == playground.images.labels[:48]
    chosen = int(right.nonzero()[0])  # what is wrong already is not attacked
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page is tried")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("#says tr").nth(2).wait_for()
        page.locator(".strip button").nth(chosen).click()
        sync_api.expect(page.locator("#state")).to_have_text("")
        before = page.locator("#attacked").get_attribute("src")
        page.locator("#eps").fill("200")
        sync_api.expect(page.locator("#attacked")).not_to_have_attribute("src", before)
        assert page.locator(".strip button").nth(chosen).get_attribute("aria-pressed") == "true"
        clean = page.locator("#clean").get_attribute("src")
        noise = base64.b64decode(encoded(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)))
        page.locator("#file").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": noise})
        sync_api.expect(page.locator("#clean")).not_to_have_attribute("src", clean)
        page.locator("#file").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
        sync_api.expect(page.locator("#error")).to_contain_text("the file")
        refused = complaints.pop()
        assert "400" in refused
        browser.close()
    assert not complaints


class Linear(torch.nn.Module):
    """Two classes, divided by the sign of w . x + b."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        score = x.flatten(1) @ self.weight.flatten() + self.bias
        return torch.stack((-score, score), 1)


@pytest.fixture
def digits_pair():
    """A linear classifier and images of two classes, of which it knows most; far from the ends of the pixels' range."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 4, 4, generator=random)
    images = torch.randint(100, 156, (4, 1, 4, 4), generator=random, dtype=torch.uint8)
    linear = Linear(weight, torch.zeros(()))
    labels = linear(images.float() / 255).argmax(1)
    labels[3] = 1 - labels[3]
    return linear, Split(images, labels, ("no", "yes"))


def test_the_smallest_eps_is_the_distance_of_a_linear_model(digits_pair):
    linear, images = digits_pair
    playground = Playground(linear, images, ThreatModel("Linf", 0.1), beside=("plain", linear))
    score = linear(images.images.float() / 255)[:, 1]
    for sample in range(4):
        exact = float(score[sample].abs() / linear.weight.abs().sum())
        for target in (0, None):
            found = playground.smallest({"sample": sample, "target": target})
            step = found["most"] / 2**HALVINGS
            if (score[sample] > 0) != bool(images.labels[sample]):
                assert found["eps"] == 0
            else:
                assert exact <= found["eps"] + 1e-6 <= exact + 2 * step + 1 / 255


def test_what_stands_beside_is_attacked_for_itself(playground):
    alone = playground.attack({"sample": 2, "eps": 0.15})
    assert alone["beside"] is None
    both = Playground(
        playground.model, playground.images, playground.threat, count=48, beside=("same", playground.model)
    )
    found = both.attack({"sample": 2, "eps": 0.15})
    assert found["targets"] == alone["targets"]
    # The model beside is known by its last output alone, which is then the first to draw a start.
    assert found["beside"]["name"] == "same" and found["beside"]["clean"] == [alone["says"][-1]]


def test_an_image_is_turned_into_a_class_as_a_counterfactual_is(server, playground):
    offer = json.loads(ask(server, "GET", "/offer")[1])
    assert offer["radius"] == pytest.approx(4 * (64 / 3072) ** 0.5)
    asked = {"sample": 3, "to": 8, "radius": 1.5, "target": 2}
    status, body = ask(server, "POST", "/turn", asked)
    assert status == 200
    found = json.loads(body)
    x = playground.images.images[3:4].float() / 255
    expected = counterfactual(playground.model, x, torch.tensor([8]), ThreatModel("L2", 1.5))
    pixels = (expected.image[0] * 255).round().to(torch.uint8)
    assert found["turned"] == found["film"][-1] == picture(pixels.numpy())
    assert found["film"][0] == picture(playground.images.images[3].numpy())
    assert len(found["film"]) == FILM
    assert found["distance"] == pytest.approx(float(expected.distance), rel=1e-5)
    assert found["distance"] <= 1.5 + 1e-5
    with torch.no_grad():
        logits = [
            *playground.model.head_logits(pixels[None].float() / 255)[0],
            playground.model(pixels[None].float() / 255)[0],
        ]
    names = playground.images.class_names
    assert [said["class"] for said in found["says"]] == [names[int(each.argmax())] for each in logits]
    assert [said["of_label"] for said in found["says"]] == pytest.approx(
        [float(e.softmax(0)[8]) for e in logits], rel=1e-3
    )
    other = json.loads(ask(server, "POST", "/turn", {**asked, "target": 0})[1])
    assert other["turned"] != found["turned"]


@pytest.mark.parametrize(
    "wrong", [{"to": 10}, {"to": None}, {"to": True}, {"radius": 0}, {"radius": "x"}, {"target": 7}, {"target": None},
              {"sample": 99}],
)  # fmt: skip
def test_what_cannot_be_turned_is_refused_in_words(server, wrong):
    status, body = ask(server, "POST", "/turn", {"sample": 0, "to": 1, "radius": 1.0, "target": 0, **wrong})
    assert status == 400
    assert next(iter(wrong)) in json.loads(body)["error"]


@pytest.mark.parametrize("target", [None, "0", 7, True])
def test_an_output_that_is_not_there_is_refused(server, target):
    status, body = ask(server, "POST", "/smallest", {"sample": 1, "target": target})
    assert status == 400 and "target" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Split(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("b", "a")), "classes"),
        (Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a", "b")), "images"),
    ],
)
def test_a_model_of_other_images_or_classes_is_not_put_beside(other, message):
    shown = Split(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a", "b"))
    with pytest.raises(UserError, match=f"--beside other: .*{message}"):
        check_beside("other", other, "mine", shown)
    check_beside("other", shown, "mine", shown)
