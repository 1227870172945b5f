"""A slow evaluation as a program of its own, to be killed or to be one of several.

evaluation_job.py FOLDER [RANK WORLD PORT [ATTACK ...]]
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualhead.evaluation import Evaluation, evaluate
from dualhead.evaluation.journal import Journal
from helpers.evaluation import THREAT, patterns, trained

ATTACKS = ["pgd-10", {"name": "pgd", "steps": 4, "restarts": 3}]


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = trained(), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.model(x)


def main(folder: str | None, seconds: float = 0.0, attacks: list = ATTACKS, count: int = 60) -> Evaluation:
    images, labels = patterns(count)
    return evaluate(
        Slow(seconds),
        images,
        labels,
        threat=THREAT,
        attacks=attacks,
        batch_size=16,
        precision="float32",
        output_dir=folder,
        save_adversarial=True,
    )


def slowly(folder: str) -> None:
    """What a process of its own does; puts down what is under way three times a second."""
    Journal.flight_interval = 0.3
    torch.set_num_threads(1)
    main(folder, seconds=0.05)


if __name__ == "__main__":
    folder, *group = sys.argv[1:]
    Journal.flight_interval = 0.3
    torch.set_num_threads(1)
    if group:
        rank, world, port = map(int, group[:3])
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        print(main(folder, attacks=group[3:] or ATTACKS).robust_accuracy)
        dist.destroy_process_group()
    else:
        main(folder, seconds=0.03)
