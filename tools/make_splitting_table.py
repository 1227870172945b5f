"""Make docs/splitting.md: where models of transformers can be cut, checked row by row.

    python tools/make_splitting_table.py

Needs transformers, which the package itself does not. Fails if anything that the document claims does not hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.architectures import ARCHITECTURES, examine  # noqa: E402  # found on the path just set

TEXT = """# Cutting models

A second head starts at the output of a layer: `split_model(model, at, example)` cuts any `torch.nn.Module` there, and
`dualhead layers MODEL` lists the layers. Four ways are tried in turn, and the first that equals the model on the
example serves (in training and evaluation mode: same logits on two batch sizes, same gradients with respect to images
and parameters, same buffers afterwards, same random numbers drawn):

| `how` | what is done | when it serves |
|---|---|---|
| `own` | the model's own `split(at)` gives trunk and tail | the model has one that knows the layer |
| `sequential` | two `nn.Sequential` | every container on the way to the layer is one |
| `traced` | torch.fx traces the containers on the way, and nothing else | containers branch on sizes and types only |
| `functional` | a whole forward per head; warns: trunk paid twice | containers depend on data, chance or `no_grad` |

At `input`, the place in front of the first layer, nothing is cut: the trunk passes the images on, and each head is a
whole network (`how` is `whole`). If a model has a layer called `input`, that layer is meant.

Handled: several tensors across the cut, class tokens and other parameters of a container, defaulted arguments,
functional dropout and other branches on `self.training`, operations in place behind the cut, modules without weights
called on both sides, weights shared across the cut (the second head gets its own; trunk and head 1 then train together
or not at all), outputs as tensor, tuple, dict or object with `.logits`. A traced cut is for images of the example's
size.

Refused, in one line with the nearest layers that work: a layer that runs twice or never in a pass, one behind which
nothing can be trained, and weights on both sides of a cut that only `functional` could make.

## Models of transformers

Small, randomly initialised models of transformers {version}, each cut at its first, middle and last block. For every
row: equal logits and equal gradients (all parameters and the image) in both modes, a second head that trains, and a
trunk, first head and aggregator that meanwhile do not change by a bit.

| model | block | layer | how | what crosses (without the batch), or why not |
|---|---|---|---|---|
{rows}

Made by `python tools/make_splitting_table.py`.
"""


def main() -> None:
    lines = [examine(architecture, place) for architecture in ARCHITECTURES for place in ("first", "middle", "last")]
    text = TEXT.format(version=transformers.__version__, rows="\n".join(lines))
    (ROOT / "docs" / "splitting.md").write_text(text)


if __name__ == "__main__":
    main()
