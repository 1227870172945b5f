"""Initialisation shared by backbones."""

from __future__ import annotations

import math

from torch import nn


def init_he_fan_out(model: nn.Module) -> None:
    """Initialise as published WideResNets are: convolutions N(0, 2 / (k k out)), He et al. 2015 with fan-out.

    Batch norm starts at 1 and 0, linear biases at 0; linear weights stay as they are, at torch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
