"""What aggregators cost beside the backbone that they serve: parameters, bytes, milliseconds of a forward pass.

    python benchmarks/aggregators.py --json benchmarks/results/aggregators.json

WRN-34-10 at 32x32 up to 200 classes, ResNet-50 (of transformers) at 224x224 for 1,000. Backbone and aggregators are
timed in turn, round after round, and the best round of each counts: what else the machine does only adds to a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.heads import aggregators
from dualhead.models import Normalize, backbones, count_parameters
from dualhead.system.devices import describe_environment

NAMES = ("pairwise_cnn", "pairwise_shared", "linear", "mean")
PLAN = {
    10: ("wideresnet-34-10", 32),
    100: ("wideresnet-34-10", 32),
    200: ("wideresnet-34-10", 32),
    1000: ("hf:resnet", 224),
}


def seconds(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        call()
    return time.perf_counter() - began


def size(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def measure(classes: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    name, side = PLAN[classes]
    torch.manual_seed(0)
    backbone = backbones.build(name).create(classes, (3, side, side), Normalize.identity(3)).eval()
    images, head_logits = torch.rand(batch, 3, side, side), torch.randn(batch, 2, classes)
    made: dict[str, nn.Module] = {}
    for kind in NAMES:
        try:
            made[kind] = aggregators.build(kind).create(classes).eval()
        except UserError:  # pairwise_cnn refuses many classes
            continue
    times: dict[str, list[float]] = {kind: [] for kind in ("backbone", *made)}
    for number in range(rounds + 1):
        taken = {"backbone": seconds(lambda: backbone(images))}
        for kind, module in made.items():
            taken[kind] = min(seconds(lambda m=module: m(head_logits)) for _ in range(5))
        if number:  # the first round pays for warming up
            for kind, value in taken.items():
                times[kind].append(value)
    rows = []
    for kind, module in {"backbone": backbone, **made}.items():
        rows.append(
            {
                "classes": classes, "module": name if kind == "backbone" else kind, "batch": batch,
                "parameters": count_parameters(module), "bytes": size(module),
                "milliseconds": 1e3 * min(times[kind]),
                "share_of_parameters": count_parameters(module) / count_parameters(backbone),
                "share_of_time": min(times[kind]) / min(times["backbone"]),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=list(PLAN), choices=list(PLAN))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for classes in arguments.classes for row in measure(classes, arguments.batch, arguments.rounds)]
    print("| classes | module | parameters | bytes | ms | of the backbone's parameters | of its time |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['classes']} | {row['module']} | {row['parameters']:,} | {row['bytes']:,} | "
            f"{row['milliseconds']:.2f} | {row['share_of_parameters']:.3%} | {row['share_of_time']:.2%} |"
        )
    if arguments.json is not None:
        content = {"environment": describe_environment(torch.device("cpu")), "rounds": arguments.rounds, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
