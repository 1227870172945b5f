"""Print what adversarial training costs in floating-point operations: a forward pass counted, the rest arithmetic."""

from __future__ import annotations

import torch

from dualhead.models import Normalize, backbones, count_parameters
from dualhead.system.flops import CountFlops

TRADES, SAT = 27, 23
"""Forward passes that a step of 10 attack steps costs, for each image."""
CASES = [("resnet-50", 1000, 224, 1_281_167, 90), ("wideresnet-34-10", 10, 32, 50_000, 76)]


def main() -> None:
    print("| network, images | parameters | F, GFLOP | epochs | TRADES, FLOP | SAT, FLOP |\n|---|---|---|---|---|---|")
    for name, classes, size, images, epochs in CASES:
        shape = (3, size, size)
        model = backbones.build(name).create(classes, shape, Normalize.identity(3)).eval()
        counter = CountFlops()
        with counter, torch.no_grad():
            model(torch.zeros(1, *shape))
        whole = [f"{cost * images * epochs * counter.total:.2e}" for cost in (TRADES, SAT)]
        facts = [f"{name}, {size}x{size}, {images:,}", f"{count_parameters(model):,}", f"{counter.total / 1e9:.2f}"]
        print(f"| {' | '.join([*facts, str(epochs), *whole])} |")


if __name__ == "__main__":
    main()
