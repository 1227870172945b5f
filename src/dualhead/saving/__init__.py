"""Models on disk: save, load, export."""

from dualhead.saving.models import (
    CONFIG,
    Architecture,
    check_hub_name,
    export,
    export_onnx,
    find_model,
    load,
    load_base_weights,
    normalisation_of,
    push_to_hub,
    read_config,
    save_model,
    view,
    write_card,
    write_config,
)
from dualhead.saving.onnx import require_onnx

__all__ = [
    "CONFIG",
    "Architecture",
    "check_hub_name",
    "export",
    "export_onnx",
    "find_model",
    "load",
    "load_base_weights",
    "normalisation_of",
    "push_to_hub",
    "read_config",
    "require_onnx",
    "save_model",
    "view",
    "write_card",
    "write_config",
]
