"""The model of clean data beside which the trigger of a poison is measured: does it know the same classes?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.data import Split, among
from dualhead.errors import UserError
from dualhead.evaluation import answers
from dualhead.models import output_of_one
from dualhead.saving import CONFIG, Architecture, find_model, load, read_config


@dataclass(frozen=True)
class CleanModel:
    """A model that learnt from clean data, and the numbers that it has for the classes of the test images.

    Args:
        network: images float32 [B, C, H, W] in [0, 1] to logits.
        classes: by the label of the test images.
    """

    network: nn.Module
    classes: tuple[int, ...]

    @classmethod
    def of(cls, where: str, test: Split) -> CleanModel:
        """Load one, and ask it about one of the images that it will be shown.

        Args:
            where: a run, a saved model or a Hub name.
            test: the images, with their classes.

        Raises:
            UserError: if there is none, or it is for other images or classes.
        """
        folder = find_model(where)
        config = read_config(folder)
        architecture = Architecture.parse(config["architecture"], str(folder / CONFIG))
        channels, classes = architecture.image_shape[0], architecture.num_classes
        one_each = Split(torch.zeros(test.num_classes, 1, 1, 1, dtype=torch.uint8), torch.arange(test.num_classes),
                         test.class_names)  # fmt: skip
        known = among(one_each, tuple(map(str, config.get("class_names", ()))), where)
        if (known.num_classes, test.image_shape[0]) != (classes, channels):
            raise UserError(
                f"{where} is for {classes} classes of {channels}-channel images, and the test images are of "
                f"{known.num_classes} classes and {test.image_shape[0]} channels; name a model of the same data"
            )
        network = load(where)
        output_of_one(network, test.image_shape, where)
        return cls(network, tuple(known.labels.tolist()))

    def taken_for(self, label: int, images: Tensor, batch_size: int, device: torch.device) -> NDArray[np.bool_]:
        """Tell which images uint8 [N, C, H, W] it takes for the class of a label of the test images, bool [N]."""
        return np.asarray(answers(self.network.to(device), images, batch_size) == self.classes[label])
