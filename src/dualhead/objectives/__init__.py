"""Methods of training, one a file: what they need to see, what their attacks climb, what they descend."""

from dualhead.objectives.base import (
    ATTACKED,
    BEFORE,
    CLEAN,
    EPOCH,
    OWN,
    Around,
    Features,
    Images,
    Inner,
    Labels,
    Logits,
    LossTerms,
    Need,
    Objective,
    Passed,
    Seen,
    Slope,
    check_weighable,
    objectives,
    passed,
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
    "Features",
    "Images",
    "Inner",
    "Labels",
    "Logits",
    "LossTerms",
    "Need",
    "Objective",
    "Passed",
    "Seen",
    "Slope",
    "build",
    "check_weighable",
    "names",
    "objectives",
    "passed",
    "weighted",
]
