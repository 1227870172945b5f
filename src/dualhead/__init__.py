"""Dual Head Adversarial Training: make image classifiers robust to adversarial examples, and measure how robust.

    import dualhead

    result = dualhead.train("digits", run_dir="runs/digits")
    model = dualhead.load("runs/digits")
    dualhead.evaluate(model, images, labels, threat=dualhead.ThreatModel("Linf", "8/255"), attacks=["pgd-40"])

`attach_second_head` makes a `DualHeadClassifier` of any classifier. What recipes can name lies in the registries
`aggregators`, `attacks`, `augmentations`, `backbones` and `objectives`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dualhead.system.waiting import wait_shortly

if TYPE_CHECKING:
    from dualhead.attacks import attacks
    from dualhead.data import augmentations
    from dualhead.errors import Interrupted, RunError, UserError
    from dualhead.evaluation import Evaluation, evaluate
    from dualhead.heads import DualHeadClassifier, aggregators, attach_second_head, split_model
    from dualhead.models import backbones
    from dualhead.objectives import objectives
    from dualhead.runs import RunResult, train
    from dualhead.saving import load
    from dualhead.threats import Threat, ThreatModel, threats

__all__ = [
    "DualHeadClassifier",
    "Evaluation",
    "Interrupted",
    "RunError",
    "RunResult",
    "Threat",
    "ThreatModel",
    "UserError",
    "aggregators",
    "attach_second_head",
    "attacks",
    "augmentations",
    "backbones",
    "evaluate",
    "load",
    "objectives",
    "split_model",
    "threats",
    "train",
]

wait_shortly()  # before anything loads torch, and with it the runtime that reads the variables

# Loaded when asked for: torch takes seconds to import, and `dualhead --help` needs none of it.
_HOMES = {
    "dualhead.attacks": ("attacks",),
    "dualhead.data": ("augmentations",),
    "dualhead.errors": ("Interrupted", "RunError", "UserError"),
    "dualhead.evaluation": ("Evaluation", "evaluate"),
    "dualhead.heads": ("DualHeadClassifier", "aggregators", "attach_second_head", "split_model"),
    "dualhead.saving": ("load",),
    "dualhead.models": ("backbones",),
    "dualhead.objectives": ("objectives",),
    "dualhead.runs": ("RunResult", "train"),
    "dualhead.threats": ("Threat", "ThreatModel", "threats"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'dualhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
