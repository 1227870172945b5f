"""A page to play with a model: choose an image, move eps, see the attack and what each head says of it.

The page is served to this machine only. It needs nothing that is not installed anyway.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.data import Framing, Split, decode_single, to_bytes
from dualhead.errors import UserError
from dualhead.evaluation import Gallery, counterfactual, make_gallery, outputs_of, read_logits
from dualhead.names import name_of
from dualhead.report import NO_CLASS, change, picture
from dualhead.threats import Threat, ThreatModel

LOOPBACK = "127.0.0.1"
MOST_BYTES = 64_000_000
"""Most bytes that a page may send: a large photograph, in base64."""
MOST_EPS = 4.0
"""Largest eps at which a fooled output is searched for, as a share of the model's own."""
HALVINGS = 7
"""Halvings of the interval in which the smallest eps lies: to a part in 128."""
TURN_RADIUS = 4.0
"""L2 radius within which an image of `TURN_VALUES` values is turned into another class, as published for CIFAR-10."""
TURN_VALUES = 3 * 32 * 32
TURN_STEPS = 40
FILM = 6
"""Pictures of the way to another class, both ends included."""
HTTP_PORT = 80
"""Port that a browser leaves out of an address."""
PAGE = Path(__file__).with_name("play.html")


class _Last(nn.Module):
    """One output of a model, the last unless told, as a classifier of its own."""

    def __init__(self, model: nn.Module, output: int = -1) -> None:
        super().__init__()
        self.model, self.output = model, output
        self._outputs = outputs_of(model, None)

    def forward(self, x: Tensor) -> Tensor:
        if self._outputs is None:
            if self.output not in (0, -1):
                raise UserError(f"target must be 0, since the model has one output, got {self.output}")
            return read_logits(self.model, x)
        each = self._outputs(x)
        if not -each.shape[1] <= self.output < each.shape[1]:
            raise UserError(f"target must lie in 0 to {each.shape[1] - 1}, got {self.output}")
        return each[:, self.output]


class Playground:
    """A model, images to try on it, and what an attack makes of them.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits; on its device.
        images: some to choose from, with their labels and class names.
        threat: what the adversary may do, with the eps that the page starts with.
        framing: how the images came to their form, and an image of one's own does; None: they were stretched.
        count: how many of the images are offered.
        beside: another model of the same images and classes, such as one that is not defended, and its name; it is
            attacked for itself.
    """

    def __init__(
        self, model: nn.Module, images: Split, threat: Threat, framing: Framing | None = None, count: int = 60,
        beside: tuple[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.images, self.threat = model, images, threat
        self.framing = framing or Framing()
        self.beside = beside
        self.count = min(count, len(images))
        self._busy = threading.Lock()

    def offer(self) -> dict[str, Any]:
        """Return what the page begins with: images, their labels, class names, and the threat model."""
        return {
            "images": [picture(image.numpy()) for image in to_bytes(self.images.images[: self.count])],
            "labels": self.images.labels[: self.count].tolist(),
            "classes": list(self.images.class_names),
            "shape": list(self.images.image_shape),
            "norm": self.threat.kind,
            "eps": self.threat.eps,
            # In larger images a ball of equal radius holds less change in each pixel.
            "radius": TURN_RADIUS * math.sqrt(math.prod(self.images.image_shape) / TURN_VALUES),
        }

    def picture(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The pixels of an image of one's own, decoded and brought to size as images to train on and to measure are.

        Args:
            asked: `file`, an encoded image in base64.

        Returns:
            `pixels`, for `attack`.

        Raises:
            UserError: if it is no image that can be read.
        """
        content = asked.get("file")
        if not isinstance(content, str):
            raise UserError("file must be an image in base64")
        pixels = decode_single(base64.b64decode(content), self.images.image_shape, self.framing)
        return {"pixels": pixels.transpose(1, 2, 0).ravel().tolist()}

    def attack(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Attack one image, each output in turn, and say what all outputs make of it.

        Args:
            asked: `sample`, the position of an image on offer, or `pixels`, numbers 0 to 255 in the order [H, W, C];
                `eps`; and `label` for an image of one's own, whose label else is what the model takes it for.

        Raises:
            UserError: for anything that does not fit.
        """
        image, label = self._image(asked)
        eps = _number(asked.get("eps"), "eps", 0.0)
        threat = self.threat.within(eps)
        with self._busy:
            if label is None:
                label = int(make_gallery(self.model, image[None], [0], threat=threat, landscapes=(), shares=())
                            .clean_prediction[0, -1])  # fmt: skip
                if label < 0:
                    raise UserError("the model's logits for this image are not numbers; say what the image shows")
            made = make_gallery(self.model, image[None], [label], threat=threat, landscapes=(), shares=(1.0,))
            other = self.beside and make_gallery(_Last(self.beside[1]), image[None], [label], threat=threat,
                                                 landscapes=(), shares=(1.0,))  # fmt: skip
        outputs = [name_of(str(output)) for output in made.outputs]
        return {
            "label": label,
            "class": self.images.class_names[label],
            "clean": picture(made.original[0]),
            "says": self._says(made.clean_prediction[0], made.clean_probability[0], label),
            "outputs": outputs,
            "targets": [self._target(made, target, name, label) for target, name in enumerate(outputs)],
            "beside": other and self.beside and {
                **self._target(other, 0, self.beside[0], label),
                "clean": self._says(other.clean_prediction[0], other.clean_probability[0], label),
            },
        }  # fmt: skip

    def smallest(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Search the smallest eps at which PGD-20 fools an output, by bisection.

        What it finds is an upper bound: another attack may need less.

        Args:
            asked: the image, as for `attack`; `target`, the position of an output, or null for the model beside.

        Returns:
            `eps`, null if nothing up to `most` fools it; 0 where it is wrong without an attack.

        Raises:
            UserError: for anything that does not fit.
        """
        image, label = self._image(asked)
        target = asked.get("target")
        with self._busy:
            if target is None and self.beside is not None:
                model: nn.Module = _Last(self.beside[1])
            elif isinstance(target, int) and not isinstance(target, bool):
                model = _Last(self.model, target)
            else:
                raise UserError("target must be the position of an output")
            if label is None:
                label = int(make_gallery(_Last(self.model), image[None], [0], threat=self.threat, landscapes=(),
                                         shares=()).clean_prediction[0, -1])  # fmt: skip
            low, high = 0.0, MOST_EPS * self.threat.eps

            def fooled(eps: float) -> bool:
                made = make_gallery(model, image[None], [label], threat=self.threat.within(eps), landscapes=(),
                                    shares=(1.0,))  # fmt: skip
                return bool(made.clean_prediction[0, 0] != label or made.prediction[0, 0, 0, 0] != label)

            clean = make_gallery(model, image[None], [label], threat=self.threat, landscapes=(), shares=())
            if clean.clean_prediction[0, 0] != label:
                return {"eps": 0.0, "most": high}
            if not fooled(high):
                return {"eps": None, "most": high}
            most = high
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (low, middle) if fooled(middle) else (middle, high)
        return {"eps": high, "most": most}

    def turn(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Turn one image into another class within an L2 ball, by the gradients of one output.

        Args:
            asked: the image, as for `attack`; `to`, the position of a class; `radius` of the ball; `target`, the
                position of an output.

        Returns:
            `turned`, `change` and `scale`: pictures, as of an attack; `distance`, L2; `film`: the way there; `says`:
            what each output makes of the picture.

        Raises:
            UserError: for anything that does not fit.
        """
        image, _ = self._image(asked)
        to, target = asked.get("to"), asked.get("target", -1)
        if not isinstance(to, int) or isinstance(to, bool) or not 0 <= to < len(self.images.class_names):
            raise UserError(f"to must lie in 0 to {len(self.images.class_names) - 1}, got {to}")
        if not isinstance(target, int) or isinstance(target, bool):
            raise UserError("target must be the position of an output")
        ball = ThreatModel("L2", _number(asked.get("radius"), "radius", 0.0))
        with self._busy:
            parameter = next(self.model.parameters(), None)
            x = image[None].to("cpu" if parameter is None else parameter.device).float() / 255.0
            wanted = torch.tensor([to], device=x.device)
            found = counterfactual(_Last(self.model, target), x, wanted, ball, steps=TURN_STEPS)
            film = to_bytes(found.path[:, 0].cpu())[np.linspace(0, TURN_STEPS, FILM).round().astype(int)]
            made = make_gallery(self.model, film[-1:], [to], threat=self.threat, landscapes=(), shares=())
        difference, scale = change(image.numpy(), film[-1].numpy())
        return {
            "class": self.images.class_names[to],
            "turned": picture(film[-1].numpy()),
            "change": difference,
            "scale": scale,
            "distance": float(found.distance[0]),
            "film": [picture(each.numpy()) for each in film],
            "outputs": [name_of(str(output)) for output in made.outputs],
            "says": self._says(made.clean_prediction[0], made.clean_probability[0], to),
        }

    def _target(self, made: Gallery, target: int, name: str, label: int) -> dict[str, Any]:
        altered = made.adversarial[target, 0, 0]
        difference, scale = change(made.original[0], altered)
        says = self._says(made.prediction[target, 0, 0], made.probability[target, 0, 0], label)
        return {"name": name, "attacked": picture(altered), "change": difference, "scale": scale, "says": says}

    def _says(self, predicted: NDArray[Any], shares: NDArray[Any], label: int) -> list[dict[str, Any]]:
        return [
            {
                "class": self.images.class_names[k] if k >= 0 else NO_CLASS,
                "probability": p,
                "of_label": q,
                "right": k == label,
            }
            # Where logits overflow there is no probability, and NaN is no JSON.
            for k, (p, q) in zip(predicted.tolist(), np.nan_to_num(shares, nan=0.0).tolist(), strict=True)
        ]

    def _image(self, asked: Mapping[str, Any]) -> tuple[Tensor, int | None]:
        if "pixels" not in asked:
            sample = asked.get("sample")
            if not isinstance(sample, int) or not 0 <= sample < self.count:
                raise UserError(f"sample must lie in 0 to {self.count - 1}, got {sample}")
            return to_bytes(self.images.images[sample : sample + 1][0]), int(self.images.labels[sample])
        channels, height, width = self.images.image_shape
        pixels = asked["pixels"]
        if not isinstance(pixels, list) or len(pixels) != channels * height * width:
            raise UserError(f"pixels must be {height} x {width} x {channels} numbers")
        levels = torch.tensor([int(_number(level, "a pixel", -1.0)) for level in pixels]).clamp(0, 255)
        label = asked.get("label")
        if label is not None and (not isinstance(label, int) or not 0 <= label < len(self.images.class_names)):
            raise UserError(f"label must be null or lie in 0 to {len(self.images.class_names) - 1}, got {label}")
        return levels.to(torch.uint8).reshape(height, width, channels).permute(2, 0, 1), label


def check_beside(name: str, images: Split, model: str, shown: Split) -> None:
    """Refuse a model beside another that is not of the same images and classes.

    Raises:
        UserError: saying what differs.
    """
    if images.image_shape != shown.image_shape:
        raise UserError(
            f"--beside {name}: takes images {list(images.image_shape)}, and {model} {list(shown.image_shape)}"
        )
    if images.class_names != shown.class_names:
        raise UserError(f"--beside {name}: its classes are not those of {model}, in the same order")


def _number(value: object, name: str, above: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not above < number < math.inf:
        raise UserError(f"{name} must be a number greater than {above:g}, got {str(value)[:40]}")
    return number


def serve(playground: Playground, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on the loopback interface; its `serve_forever` does the work, its `server_port` says where.

    Args:
        playground: what is played with.
        port: 0 for any that is free.

    Raises:
        UserError: if the port is taken.
    """
    page = PAGE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._welcome():
                if self.path == "/":
                    self._send(page.encode(), "text/html; charset=utf-8")
                elif self.path == "/offer":
                    self._json(playground.offer())
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            # Another site's page cannot send this type without being allowed to.
            plain = self.headers.get("Content-Type") == "application/json"
            if not self._welcome():
                return
            short = length.isdecimal() and len(length) < 10 and int(length) <= MOST_BYTES
            answers = {
                "/attack": playground.attack, "/picture": playground.picture, "/smallest": playground.smallest,
                "/turn": playground.turn,
            }  # fmt: skip
            if self.path not in answers or not plain or not short:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return
            try:
                asked = json.loads(self.rfile.read(int(length)))
                if not isinstance(asked, dict):
                    raise UserError("an object is expected")
                self._json(answers[self.path](asked))
            except (UserError, ValueError, RecursionError) as error:
                self._json({"error": " ".join(str(error).split())}, HTTPStatus.BAD_REQUEST)
            except Exception as error:  # of a model that is somebody's own; the page says so and can go on
                told = f"{type(error).__name__}: {error}"
                self._json({"error": " ".join(told.split())}, HTTPStatus.INTERNAL_SERVER_ERROR)

        def _welcome(self) -> bool:
            """Whether an address of this machine was asked for; names that others let point here are refused."""
            port = cast("ThreadingHTTPServer", self.server).server_port
            names = (LOOPBACK, "localhost")
            hosts = {f"{name}:{port}" for name in names} | ({*names} if port == HTTP_PORT else set())
            if self.headers.get("Host") in hosts:
                return True
            self.send_error(HTTPStatus.FORBIDDEN)
            return False

        def _json(self, content: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
            self._send(json.dumps(content).encode(), "application/json", status)

        def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", policy),
                ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
            ):  # fmt: skip
                self.send_header(name, value)
            with contextlib.suppress(ConnectionError):  # the page has been closed, or has moved on
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal is the user's."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: cannot be used ({error}); leave it out for any that is free") from None
