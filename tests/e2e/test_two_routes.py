"""What is a route's own decides what it becomes: the same five rows on the digits as a loop by hand gave."""

from __future__ import annotations

import pytest
import torch

from dualhead.evaluation import RouteSetting, evaluate, evaluate_routes
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.folder import load_stage
from dualhead.runs.run import train

ATTACK = "pgd-20"
QUICK = (
    "evaluate.limit=10", "evaluate.attacks=[pgd-1]", "evaluate.gallery=0", "validation.every=15", "runtime.lanes=1",
    "data.augment=[]", "data.validation=50",
)  # fmt: skip
VARIANTS = {
    "single, separate": ("digits_hybrid",),
    "single, joint": ("digits_hybrid", "stages.hybrid.forward=joint"),
    "own statistics": ("digits_dual_bn", "model.own=[statistics]"),
    "own affine": ("digits_dual_bn", "model.own=[affine]", "stages.hybrid.forward=joint"),
    "dual": ("digits_dual_bn",),
}


def measured(folder, recipe, *overrides):
    """Clean and robust accuracy, in percent, of each route of a trained recipe; of a single network, as `all`."""
    resolved = load_recipe(recipe, [*QUICK, *overrides])
    train(resolved, run_dir=folder)
    model = load_stage(folder)[0].eval()
    test = resolved.data.load("test")
    images, labels = test.images, test.labels
    settings = {"threat": resolved.threat, "attacks": [ATTACK], "batch_size": 256}
    if model.__class__.__name__ == "CNN":
        found = {"all": evaluate(model, images, labels, diagnostics=False, **settings).results}
    else:
        asked = RouteSetting(
            **settings, clean="head1", robust="head2", kinds=("own", "crossed"), options={"diagnostics": False}
        )
        found = evaluate_routes(model, images, labels, asked, output_dir=folder / "routes")["routes"]
    return {
        name: (100 * of["clean_accuracy"], 100 * of["robust_accuracy"][ATTACK]) for name, of in found.items()
    }  # fmt: skip


@pytest.mark.slow
def test_affine_parameters_of_their_own_make_two_classifiers_and_statistics_alone_make_none(tmp_path):
    torch.set_num_threads(1)
    rows = {name: measured(tmp_path / str(n), *made) for n, (name, made) in enumerate(VARIANTS.items())}
    print(rows)
    (single, joint) = (rows[f"single, {how}"]["all"] for how in ("separate", "joint"))
    for name in ("own affine", "dual"):
        clean, robust = rows[name]["head1"], rows[name]["head2"]
        assert clean[1] < robust[1] - 10.0, name  # an accurate route and a robust one
        assert clean[0] > robust[0] - 1.0, name
        assert abs(robust[1] - single[1]) < 8.0, name  # which is no more robust than one batch norm
    assert set(rows["own statistics"]) == {"head1", "head2"}
    for route in rows["own statistics"].values():  # own statistics alone: one classifier, twice
        assert abs(route[0] - single[0]) < 3.0
        assert abs(route[1] - single[1]) < 8.0
    assert abs(joint[1] - single[1]) < 8.0
    dual = rows["dual"]
    for affine, other in (("head1", "head2"), ("head2", "head1")):
        exchanged = dual[f"statistics-{other}_affine-{affine}"]  # stored statistics belong to their affine parameters
        assert exchanged[0] < dual[affine][0] - 1.0
        assert exchanged[1] < dual[affine][1]
