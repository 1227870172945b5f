"""Backbones: a recipe's choice of network, which makes an ordinary classifier of images in [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dualhead.components.registry import Registry
from dualhead.errors import UserError, under
from dualhead.models.normalize import Normalize
from dualhead.system.modes import in_eval_mode
from dualhead.system.outputs import logits_of, two_at_least

ImageShape = tuple[int, int, int]
"""Channels, height, width."""
ChannelStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for images in [0, 1]."""


@dataclass(frozen=True)
class Preprocessing:
    """How images come to the size that published weights were trained with.

    Attributes:
        size: height and width.
        crop: the share of the image whose middle is taken; None: all of it is stretched to the size.
        squash: the middle has the proportions of the image, and is stretched.
        resample: the filter, by Pillow's name.
    """

    size: tuple[int, int]
    crop: float | None = None
    squash: bool = False
    resample: str = "bicubic"


class Backbone(ABC):
    """A network by name. Subclasses are frozen dataclasses registered in `backbones`.

    Attributes:
        attach_at: the module after which a second head starts by default, about the end of the first stage; None
            where the layers are not known beforehand, and the recipe has to name one.
        normalises: whether its networks take images in [0, 1] as they are, so that nothing is put before them unless
            the recipe sets `model.normalize`.
    """

    registered_name: ClassVar[str]
    attach_at: ClassVar[str | None] = None
    normalises: ClassVar[bool] = False

    def create(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        """Make a classifier with fresh weights, drawn from torch's global generator (`torch.manual_seed`).

        Args:
            num_classes: logits per image, at least 2.
            image_shape: channels, height and width of the images, each at least 1.
            normalize: applied to the images first; part of the classifier, so that attacks see images in [0, 1].

        Returns:
            A module from images float [B, C, H, W] in [0, 1] to logits [B, num_classes].

        Raises:
            UserError: for impossible sizes, or a normalisation for another number of channels.
        """
        if num_classes < 2:
            raise UserError(f"a classifier needs at least 2 classes, got {num_classes}")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise UserError(f"image shape must be (channels, height, width), each at least 1, got {tuple(image_shape)}")
        if normalize.channels != image_shape[0]:
            key = f"; data.channels={normalize.channels} reads them so" if normalize.channels in (1, 3) else ""
            raise UserError(
                f"normalisation is for {normalize.channels} channels, but the images have {image_shape[0]}{key}"
            )
        return self._build(num_classes, image_shape, normalize)

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """Load the classifier as it was published, with its weights and normalisation, to be measured as it is.

        Args:
            num_classes: of the images.
            image_shape: channels, height and width of the images.

        Raises:
            UserError: if no weights come with this network, or it is for other classes.
        """
        del num_classes, image_shape
        raise UserError(
            f"model {self.registered_name!r} is a network without weights; name a run, an exported model, or a "
            "function of yours that loads weights (package.module:factory)"
        )

    def published_normalisation(self) -> ChannelStatistics | None:
        """Return the normalisation of the published weights that it starts from; None where none is known."""
        return None

    def published_preprocessing(self) -> Preprocessing | None:
        """How images come to size for the published weights; None if nobody says."""
        return None

    def published_class_names(self) -> tuple[str, ...]:
        """The names of the classes that the published weights tell apart, in order; none if nobody says."""
        return ()

    def weights_class_names(self, num_classes: int) -> tuple[str, ...]:
        """Return the names of the classes that a new network tells apart before it is trained; none if nobody says.

        Args:
            num_classes: of the images.
        """
        del num_classes
        return self.published_class_names() if getattr(self, "pretrained", False) else ()

    def published_channels(self) -> int | None:
        """Channels of the images that the published weights are for; None if nobody says."""
        return None

    def on_its_own(self) -> Self:
        """Return the same network without references to other files, for weights that are saved beside it."""
        return self

    @abstractmethod
    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        """Make the classifier of `create`, which has checked the arguments."""


class Wrapped(nn.Module):
    """Wraps somebody else's classifier: normalises the images and reads the logits from its output.

    Args:
        normalize: applied to the images.
        model: normalised images [B, C, H, W] to anything that `logits_of` reads. Its layers are named `model.LAYER`.
        one_logit: the model gives one logit z for two classes, which are then read as [0, z].
    """

    def __init__(self, normalize: Normalize, model: nn.Module, *, one_logit: bool = False) -> None:
        super().__init__()
        self.one_logit = one_logit
        self.normalize = normalize
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        logits = logits_of(self.model(self.normalize(images)))
        return two_at_least(logits, len(images)) if self.one_logit else logits


def trial_output(model: nn.Module, image_shape: ImageShape) -> Any:
    """Run a model on one grey image, in eval mode and without a graph; its modes are put back."""
    first = next(model.parameters(), torch.empty(0))
    with in_eval_mode(model), torch.no_grad():
        return model(torch.full((1, *image_shape), 0.5, dtype=first.dtype, device=first.device))


def output_of_one(model: nn.Module, image_shape: ImageShape, where: str) -> Any:
    """Run `trial_output` of a model that somebody else wrote.

    Raises:
        UserError: if it fails on such an image.
    """
    try:
        return trial_output(model, image_shape)
    except Exception as error:  # whatever somebody else's forward may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where}: the model fails on one image of shape {tuple(image_shape)}: {reason}") from error


def check_logits(model: nn.Module, num_classes: int, image_shape: ImageShape, where: str, *, if_more: str = "") -> Any:
    """Run a model that somebody else wrote on one image, and check its logits.

    Args:
        model: the classifier.
        num_classes: logits that it must give.
        image_shape: images that it must take.
        where: the model's name in messages.
        if_more: what to do about a model of more logits, for the message.

    Returns:
        The model's output, from which `logits_of` takes the logits.

    Raises:
        UserError: if it cannot take such images, or gives another number of logits.
    """
    output = output_of_one(model, image_shape, where)
    with under(where):
        shape = tuple(logits_of(output).shape)
    one_logit = num_classes == 2 and shape in ((), (1,), (1, 1))  # read as [0, z]
    if shape != (1, num_classes) and not one_logit:
        advice = if_more and f"; {if_more}" if len(shape) == 2 and shape[1] > num_classes else ""
        raise UserError(
            f"{where}: the model gives logits of shape {shape} for one image; "
            f"the data have {num_classes} classes, so (1, {num_classes}) would be right{advice}"
        )
    return output


def last_layer(model: nn.Module, num_classes: int, image_shape: ImageShape) -> str:
    """Find the layer that gives the logits: the last to run whose weight has a row per class.

    Raises:
        UserError: if no such layer runs.
    """
    ran: list[str] = []

    def note(name: str) -> Callable[[object, object, object], None]:
        return lambda module, images, output: ran.append(name)

    hooks = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and weight.shape[0] == num_classes:
            hooks.append(module.register_forward_hook(note(name)))
    try:
        trial_output(model, image_shape)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise UserError(f"no layer that runs has a weight of {num_classes} rows; name the classifier's layer")
    return ran[-1]


def other_types(model: nn.Module) -> str:
    """Name the types of floating parameters that are not float32, as images are; empty if all are."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return ", ".join(sorted(map(str, found - {torch.float32})))


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in a model's parameters, each tensor once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


backbones: Registry[Backbone] = Registry("backbone", "dualhead.models", Backbone, imported_as="factory")
