"""Three examples of each command, for the end of its help."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final[dict[str, tuple[str, str, str]]] = {
    "demo": ("demo", "demo --run-dir runs/first", "demo --quiet --json"),
    "train": (
        "train digits",
        "train cifar10_cpu --epochs 5 --seed 1 --run-dir runs/short",
        "train digits stages.*.objective.beta=3 threat.eps=0.1",
    ),
    "show": ("show digits", "show cifar10_cpu data.source=cifar10 --no-cost", "show mine.yaml --epochs 5 --json"),
    "runs": ("runs", "runs experiments", "runs runs --json"),
    "evaluate": (
        "evaluate runs/digits --attack autoattack",
        "evaluate runs/digits --attack pgd-100,square --eps 8/255 --limit 200",
        "evaluate my_file.py:make_model --data folder/of/images --norm Linf --eps 8/255",
    ),
    "gallery": (
        "gallery runs/digits",
        "gallery runs/digits --limit 16 --eps 16/255",
        "gallery runs/digits --landscape 3,17",
    ),
    "play": (
        "play runs/digits --open",
        "play runs/digits --beside runs/digits_natural",
        "play runs/digits --port 8000 --eps 0.1",
    ),
    "layers": (
        "layers resnet-18",
        "layers wideresnet-34-10 --classes 100",
        "layers my_file.py:make_model --image-shape 3x224x224",
    ),
    "export": (
        "export runs/digits --to exported",
        "export runs/digits --to exported --onnx",
        "export runs/digits --to head1 --output-of head1",
    ),
    "report": ("report runs/digits", "report runs/digits --open", "report runs -o all.html"),
    "info": ("info runs/digits", "info runs/digits --quiet", "info runs/digits --json"),
    "sweep": (
        "sweep digits stages.*.objective.beta=3,6",
        "sweep digits --seeds 3 --epochs 10 --out runs/seeds",
        "sweep digits --seeds 4 --shard 0/2",
    ),
    "compare": ("compare runs/a runs/b", "compare runs/sweep-digits", "compare runs -o standings.json"),
    "sample": (
        "sample runs/dat",
        "sample runs/dat --classes 0-9 --count 64 --output samples",
        "sample runs/dat --classes 3 --steps 32 --step-size 0.1 --seed 1",
    ),
    "counterfactual": (
        "counterfactual runs/dat --to 3",
        "counterfactual runs/dat --to 3,8 --radius 2 --limit 5",
        "counterfactual runs/dat --steps 80 --output changed",
    ),
    "list": ("list", "list recipes", "list attacks --json"),
}
"""By command, what follows `dualhead`."""


def examples_of(command: str) -> str:
    """Return the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  dualhead {line}" for line in EXAMPLES[command])
