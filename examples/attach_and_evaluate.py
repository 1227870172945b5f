"""Attach a second head to a network of one's own, and ask what an attack leaves of both heads and of their mean.

Nothing is trained here, so the accuracies are those of guessing; what counts is how the parts fit together.
"""

from __future__ import annotations

import torch
from torch import nn

import dualhead

torch.manual_seed(0)
images, labels = torch.rand(32, 3, 16, 16), torch.arange(32) % 4
network = nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
)
model = dualhead.attach_second_head(network, "1", num_classes=4, example=images[:2], aggregator="mean")
threat = dualhead.ThreatModel("Linf", "8/255")
for output in ("head1", "head2", "mean"):
    evaluation = dualhead.evaluate(
        model.view(output), images, labels, threat=threat, attacks=["pgd-10"], diagnostics=False
    )
    print(f"{output}: clean {evaluation.clean_accuracy:.1%}, pgd-10 {evaluation.robust_accuracy['pgd-10']:.1%}")
