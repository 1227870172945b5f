"""Dual Head Adversarial Training: make image classifiers robust to adversarial examples, and measure how robust.

    import dualhead

    run = dualhead.fit(model, train=(images, labels), test=(test_images, test_labels), recipe="digits", eps="8/255")
    print(run)
    x_adv = dualhead.attack(run.model, x, y, "pgd-40", eps="8/255")
    dualhead.evaluate(run.model, x, y, threat=dualhead.ThreatModel("Linf", "8/255"), attacks=["pgd-40"])
    dualhead.save(run.model, "mine")
    model = dualhead.load("mine")

`attach_second_head` makes a `DualHeadClassifier` of any classifier. `attacks`, `objectives` and `threats`
are modules, whose `build` makes one by name; `aggregators`, `augmentations` and `backbones` are registries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dualhead.system.quota import fit_threads
from dualhead.system.waiting import wait_shortly

if TYPE_CHECKING:
    from dualhead import attacks, objectives, threats
    from dualhead.commands.fit import fit
    from dualhead.commands.quality import evaluate_generation, evaluate_ood
    from dualhead.data import augmentations
    from dualhead.errors import Interrupted, RunError, UserError
    from dualhead.evaluation import (
        Evaluation,
        attack,
        counterfactual,
        energy,
        evaluate,
        noise_seeds,
        ood_score,
        sample,
    )
    from dualhead.heads import DualHeadClassifier, aggregators, attach_second_head, layers, split_model
    from dualhead.models import backbones
    from dualhead.recipe import Recipe, load_recipe
    from dualhead.runs import RunResult, train
    from dualhead.saving import load, save
    from dualhead.threats import Threat, ThreatModel

    __version__: str

__all__ = [
    "DualHeadClassifier",
    "Evaluation",
    "Interrupted",
    "Recipe",
    "RunError",
    "RunResult",
    "Threat",
    "ThreatModel",
    "UserError",
    "__version__",
    "aggregators",
    "attach_second_head",
    "attack",
    "attacks",
    "augmentations",
    "backbones",
    "counterfactual",
    "energy",
    "evaluate",
    "evaluate_generation",
    "evaluate_ood",
    "fit",
    "layers",
    "load",
    "load_recipe",
    "noise_seeds",
    "objectives",
    "ood_score",
    "sample",
    "save",
    "split_model",
    "threats",
    "train",
]

wait_shortly()
fit_threads()  # before anything loads torch, and with it the runtime that reads the variables

# Loaded when asked for: torch takes seconds to import, and `dualhead --help` needs none of it.
_HOMES = {
    "dualhead.commands.fit": ("fit",),
    "dualhead.commands.quality": ("evaluate_generation", "evaluate_ood"),
    "dualhead.data": ("augmentations",),
    "dualhead.errors": ("Interrupted", "RunError", "UserError"),
    "dualhead.evaluation": (
        "Evaluation",
        "attack",
        "counterfactual",
        "energy",
        "evaluate",
        "noise_seeds",
        "ood_score",
        "sample",
    ),
    "dualhead.heads": ("DualHeadClassifier", "aggregators", "attach_second_head", "layers", "split_model"),
    "dualhead.models": ("backbones",),
    "dualhead.recipe": ("Recipe", "load_recipe"),
    "dualhead.runs": ("RunResult", "train"),
    "dualhead.saving": ("load", "save"),
    "dualhead.threats": ("Threat", "ThreatModel"),
}
_MODULES = ("attacks", "objectives", "threats")
"""Names of modules: importing one sets it here, so that no registry may have the name."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("dualhead")
    if name in _MODULES:
        return importlib.import_module(f"dualhead.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'dualhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
