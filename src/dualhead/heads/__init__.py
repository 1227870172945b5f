"""Two heads or more on one trunk: cutting a model at a layer, the further heads, and the aggregator over all."""

from dualhead.heads.aggregators import Aggregator, Chosen, aggregators, default_aggregator
from dualhead.heads.attach import attach_second_head
from dualhead.heads.classifier import DualHeadClassifier, Output, Part, depends_on, is_head, mean_of
from dualhead.heads.layers import LayerInfo, layers
from dualhead.heads.outputs import as_logits
from dualhead.heads.splitting import Split, split_model
from dualhead.heads.tied import DEFAULT_OWN

__all__ = [
    "DEFAULT_OWN",
    "Aggregator",
    "Chosen",
    "DualHeadClassifier",
    "LayerInfo",
    "Output",
    "Part",
    "Split",
    "aggregators",
    "as_logits",
    "attach_second_head",
    "default_aggregator",
    "depends_on",
    "is_head",
    "layers",
    "mean_of",
    "split_model",
]
