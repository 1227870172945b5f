"""Two runs with a head 1 of their own, merged: a model whose two heads they are, and which deploys the heads' mean.

    python benchmarks/strongest/merge.py RUN RUN OUT

OUT gets `model/`, which `dualhead evaluate OUT` measures, and what the two cost to train.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dualhead.system.files import write_json


def merge(runs: tuple[Path, Path], out: Path) -> None:
    """Write the merged model, its parameters and cost, and where the first run was trained."""
    configs = [json.loads((run / "model" / "config.json").read_text()) for run in runs]
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    shared = [{name: tensor for name, tensor in state.items() if name.startswith("trunk.")} for state in weights]
    one, other = shared
    same = one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    if configs[0]["architecture"] != configs[1]["architecture"] or not same:
        sys.exit(f"{runs[0]} and {runs[1]} differ in more than their heads")
    heads = {
        f"{head}.{name.removeprefix('head1.')}": tensor
        for head, state in zip(("head1", "head2"), weights, strict=True)
        for name, tensor in state.items()
        if name.startswith("head1.")
    }
    (out / "model").mkdir(parents=True, exist_ok=True)
    save_file({**one, **heads}, out / "model" / "model.safetensors")
    write_json(out / "model" / "config.json", {**configs[0], "output": "mean"})
    rows = [json.loads((run / "comparison.json").read_text())["rows"][-1] for run in runs]
    cost = {key: sum(row["training_cost"][key] for row in rows) for key in rows[0]["training_cost"]}
    parameters = sum(row["parameters"] for row in rows)
    row = {"name": "mean of heads", "output": "mean", "parameters": parameters, "training_cost": cost}
    write_json(out / "comparison.json", {"rows": [row]})
    write_json(out / "environment.json", json.loads((runs[0] / "environment.json").read_text()))


def main() -> None:
    """Read the command line."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    first, second, out = map(Path, sys.argv[1:])
    merge((first, second), out)


if __name__ == "__main__":
    main()
