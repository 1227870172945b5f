"""Models on disk: save, load, export."""

from dualhead.saving.architecture import CONFIG, Architecture, read_config, write_config
from dualhead.saving.export import checks_of, export, export_onnx, write_card
from dualhead.saving.hub import check_hub_name, push_to_hub
from dualhead.saving.models import (
    OneHeadError,
    class_names_of,
    find_model,
    load,
    load_base_weights,
    normalisation_of,
    remember,
    save,
    save_model,
    view,
)
from dualhead.saving.onnx import require_onnx

__all__ = [
    "CONFIG",
    "Architecture",
    "OneHeadError",
    "check_hub_name",
    "checks_of",
    "class_names_of",
    "export",
    "export_onnx",
    "find_model",
    "load",
    "load_base_weights",
    "normalisation_of",
    "push_to_hub",
    "read_config",
    "remember",
    "require_onnx",
    "save",
    "save_model",
    "view",
    "write_card",
    "write_config",
]
