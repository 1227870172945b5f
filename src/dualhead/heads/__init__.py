"""Two heads on one trunk: cutting a model at a layer, the second head, and the aggregator over both."""

from dualhead.heads.aggregators import Aggregator, Chosen, aggregators, default_aggregator
from dualhead.heads.attach import attach_second_head
from dualhead.heads.classifier import PARTS_OF, DualHeadClassifier, Output
from dualhead.heads.layers import LayerInfo, layers
from dualhead.heads.outputs import as_logits
from dualhead.heads.splitting import Split, split_model

__all__ = [
    "PARTS_OF",
    "Aggregator",
    "Chosen",
    "DualHeadClassifier",
    "LayerInfo",
    "Output",
    "Split",
    "aggregators",
    "as_logits",
    "attach_second_head",
    "default_aggregator",
    "layers",
    "split_model",
]
