"""Two heads or more on one trunk: cutting a model at a layer, the further heads, and the aggregator over all."""

from dualhead.heads.aggregators import Aggregator, Chosen, SeesFeatures, aggregators, default_aggregator
from dualhead.heads.attach import attach_second_head
from dualhead.heads.classifier import (
    DualHeadClassifier,
    Output,
    Part,
    depends_on,
    mean_of,
)
from dualhead.heads.joint_pass import Rows, joint_pass, refuse_unroutable
from dualhead.heads.layers import LayerInfo, layers
from dualhead.heads.routes import (
    Gap,
    MergedRoutes,
    Route,
    between,
    image_gaps,
    routes_of,
    stored_gaps,
    through,
)
from dualhead.heads.splitting import Cut, split_model
from dualhead.heads.tied import DEFAULT_OWN, own_words

__all__ = [
    "DEFAULT_OWN",
    "Aggregator",
    "Chosen",
    "Cut",
    "DualHeadClassifier",
    "Gap",
    "LayerInfo",
    "MergedRoutes",
    "Output",
    "Part",
    "Route",
    "Rows",
    "SeesFeatures",
    "aggregators",
    "attach_second_head",
    "between",
    "default_aggregator",
    "depends_on",
    "image_gaps",
    "joint_pass",
    "layers",
    "mean_of",
    "own_words",
    "refuse_unroutable",
    "routes_of",
    "split_model",
    "stored_gaps",
    "through",
]
