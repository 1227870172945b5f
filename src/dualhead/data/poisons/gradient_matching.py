"""Noise that makes training take one test image for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualhead.components.fields import Real
from dualhead.data.poisons.base import ClassName, choose, class_number, members, poisons
from dualhead.data.poisons.search import Found, Search, Surrogate, Workbench, check_steps
from dualhead.data.poisons.searched import Searched
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import ThreatModel

_NATURAL = Surrogate()


@poisons.register("gradient_matching")
@dataclass(frozen=True)
class GradientMatching(Searched):
    """Images of a class whose training gradient leads to one test image being taken for that class; labels stay.

    A surrogate tells the gradient by which it would learn the wanted answer, and the images are changed until theirs
    points the same way. After Witches' Brew, not a reproduction: images are changed as they are, where the published
    search goes through augmentation, and one start is made, where it makes eight.

    When: against training from scratch by an adversary who wants one answer and changes no label. One run tells yes or
    no, so a rate needs many test images, a poison for each.

    Paper: Geiping et al. 2021, Witches' Brew: industrial scale data poisoning via gradient matching, arXiv 2009.02276.

    Args:
        image: position among the test images of the one that is aimed at; its label must be another class.
        target: the class that it is to be taken for, of which the changed images are: its number or name.
        share: of all images.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of Adam on the sign of the gradient; its rate falls tenfold after 3, 5 and 7 eighths of them.
        step_size: its first rate, in the units of eps; None for eps / 10.
        restarts: independent starts; the one that ends best is kept.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network that gives the gradients.
        seed: of the random start, and of the choice of images.
    """

    image: int = 0
    target: ClassName = 0
    share: Real = 0.01
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 16 / 255
    steps: int = 250
    step_size: Real | None = None
    restarts: int = 1
    surrogate: Surrogate = _NATURAL
    seed: int = 0

    def search(self) -> Aligning:
        """See `Searched.search`."""
        return Aligning(
            self.surrogate, ThreatModel(self.norm, self.eps), self.seed, self.steps,
            self.eps / 10 if self.step_size is None else self.step_size, image=self.image, restarts=self.restarts,
        )  # fmt: skip

    def search_among(self, class_names: Sequence[str]) -> Aligning:
        """See `Searched.search_among`."""
        _, wanted = self.aims_at(class_names)
        return replace(self.search(), wanted=wanted)

    def aims_at(self, class_names: Sequence[str]) -> tuple[int, int]:
        """See `Poison.aims_at`."""
        return self.image, class_number(self.target, class_names, "target")

    def chosen(self, clean: Split) -> Tensor:
        """See `Searched.chosen`."""
        _, wanted = self.aims_at(clean.class_names)
        return choose(members(clean, wanted), round(self.share * len(clean)), self.seed)


@dataclass(frozen=True)
class Aligning(Search):
    """A search for images whose training gradient points where that of a wanted answer does (gradient matching).

    All images are changed together, so that 1 - cos(g, h) falls: g is the gradient of the loss with which one test
    image is taken for a wanted class, by all parameters, and h that of the mean loss of the changed images with their
    own labels. Whoever trains on these then takes steps towards the wanted answer.

    Args:
        steps: of Adam on the sign of the gradient.
        step_size: its first rate, in the units of eps.
        image: position of the test image.
        wanted: the class that it is to be taken for.
        restarts: independent starts, of which the one that ends best is kept.
    """

    steps: int
    step_size: float
    image: int = 0
    wanted: int = 0
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.steps, self.step_size)
        if not (self.restarts >= 1 and self.image >= 0):
            raise UserError(f"restarts must be at least 1 and image at least 0, got {self.restarts} and {self.image}")

    @property
    def cost(self) -> str:
        """See `Search.cost`."""
        return (
            f"the training of a surrogate, and for each start {self.steps} forward and {3 * self.steps} backward "
            "passes for each changed image, as gradients of gradients"
        )

    def described(self) -> dict[str, Any]:
        """See `Search.described`."""
        return {**super().described(), "towards": True}  # without a choice, but part of its name so far

    def aimed(self, test: Split) -> Tensor:
        """See `Search.aimed`.

        Raises:
            UserError: if there is no such image, or it is of the wanted class.
        """
        if self.image >= len(test):
            raise UserError(f"image: there is no test image {self.image}; they are 0 to {len(test) - 1}")
        if int(test.labels[self.image]) == self.wanted:
            name = test.class_names[self.wanted]
            raise UserError(f"image: test image {self.image} is of class {name!r}; choose another image or target")
        return test.take(torch.tensor([self.image])).images[:]

    def find(self, clean: Split, index: Tensor, labels: Tensor, bench: Workbench) -> Found:
        """See `Search.find`."""
        model, device = bench.model, bench.device
        x, y = clean.images[index].to(device).float() / 255, labels.to(device)
        parameters = [parameter.requires_grad_() for parameter in model.parameters()]
        wanted = torch.tensor([self.wanted], device=device)
        goal = gradient(model, parameters, bench.aimed.to(device).float() / 255, wanted)
        streams = Streams.of(self.seed, index.to(device)).fork("gradient matching")
        ends = [
            self.aligned(model, parameters, goal, x, y, streams.fork(f"start {number}"))
            for number in range(self.restarts)
        ]
        best, value = min(ends, key=lambda end: end[1])
        passes = self.restarts * self.steps * len(index)
        return Found(best, passes, 3 * passes, search={"misalignment": value})

    def aligned(
        self, model: nn.Module, parameters: Sequence[Tensor], goal: Sequence[Tensor], x: Tensor, y: Tensor,
        streams: Streams,
    ) -> tuple[Tensor, float]:  # fmt: skip
        """Return images, float32 [M, C, H, W], whose gradient is aligned with a goal, and how far it is from it.

        Args:
            model: in eval mode.
            parameters: of it.
            goal: the gradient to be met.
            x: the images as they were, in [0, 1].
            y: their labels.
            streams: randomness of the start.
        """
        threat = self.threat.for_images(x.shape[1:])
        now = threat.start(x, streams, "ball").clone().requires_grad_()
        adam = torch.optim.Adam([now], lr=self.step_size)
        falls = sorted({max(self.steps * eighths // 8, 1) for eighths in (3, 5, 7)})
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, falls, gamma=0.1)
        for _ in range(self.steps):
            value = misalignment(goal, gradient(model, parameters, now, y, graph=True))
            now.grad = torch.autograd.grad(value, now)[0].sign()
            adam.step()
            schedule.step()
            with torch.no_grad():
                now.copy_(threat.project(now, x))
        found = now.detach()
        return found, float(misalignment(goal, gradient(model, parameters, found, y)))


def gradient(
    model: nn.Module, parameters: Sequence[Tensor], x: Tensor, y: Tensor, *, graph: bool = False
) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy of some images by the parameters.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits.
        parameters: of it.
        x: images.
        y: labels, int64 [B].
        graph: keep the graph, so that the gradient can be derived by the images.
    """
    loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(parameters), create_graph=graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def misalignment(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos of the angle between two gradients, in [0, 2] (Geiping et al. 2021)."""
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    lengths = [torch.stack([each.square().sum() for each in of]).sum().sqrt() for of in (first, second)]
    return 1 - inner / (lengths[0] * lengths[1]).clamp_min(1e-12)
