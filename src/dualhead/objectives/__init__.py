"""Methods of training, one a file: what they need to see, what their attacks climb, what they descend."""

from dualhead.objectives.base import (
    ATTACKED,
    BEFORE,
    CLEAN,
    EPOCH,
    OWN,
    Around,
    Before,
    Features,
    Inner,
    Labels,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    check_weighable,
    objectives,
    weighted,
)

build = objectives.build
names = objectives.names

__all__ = [
    "ATTACKED",
    "BEFORE",
    "CLEAN",
    "EPOCH",
    "OWN",
    "Around",
    "Before",
    "Features",
    "Inner",
    "Labels",
    "Logits",
    "LossTerms",
    "Need",
    "Objective",
    "Seen",
    "build",
    "check_weighable",
    "names",
    "objectives",
    "weighted",
]
