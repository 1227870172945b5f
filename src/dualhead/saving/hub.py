"""Models on the Hugging Face Hub: upload and download."""

from __future__ import annotations

import re
from pathlib import Path

from dualhead.errors import RunError, UserError
from dualhead.heads import aggregators
from dualhead.models import backbones
from dualhead.saving.architecture import CARD, CONFIG, ONNX, WEIGHTS, Architecture, holds_model, read_config


def download(name: str) -> Path:
    """Download a model from the Hub.

    Args:
        name: `OWNER/NAME`.

    Returns:
        Its folder in the Hub's cache.

    Raises:
        UserError: if the Hub gives no such model, or its config names code to run.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the network fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: no such folder, and the Hub gives no such model ({reason})") from None
    _refuse_code(name, folder)
    return folder


def _refuse_code(name: str, folder: Path) -> None:
    """Refuse a download that names code: only code that the user names is run."""
    architecture = Architecture.parse(read_config(folder)["architecture"], str(folder / CONFIG))
    for registry, spec in ((backbones, architecture.backbone), (aggregators, architecture.aggregator or {})):
        if (code := registry.code_named(spec)) is not None:
            raise UserError(
                f"{name}: its {CONFIG} names the code {code!r}, and code that a download names is not run; if you "
                f"trust it, load the folder {folder}"
            )


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload an exported model to the Hugging Face Hub, with the credentials that `huggingface_hub` finds.

    Args:
        folder: one that `export` wrote.
        name: `OWNER/NAME`; the repository is made if need be.
        private: whether a new repository is private.

    Returns:
        The model's address.

    Raises:
        UserError: if there is no model, or the name cannot be one.
        RunError: if the Hub does not take it.
    """
    from huggingface_hub import HfApi

    if not holds_model(Path(folder)):
        raise UserError(f"{folder}: holds no finished model ({WEIGHTS} and {CONFIG})")
    check_hub_name(name)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=[CONFIG, WEIGHTS, CARD, ONNX])
    except Exception as error:  # the network fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"--push {name}: the Hub did not take it ({reason}); the model is in {folder}, the same command tries again"
        ) from None
    return str(info)


def check_hub_name(name: str) -> None:
    """Refuse a name that no model on the Hub can have.

    Raises:
        UserError: saying which names can be.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name):
        raise UserError(f"--push {name}: write OWNER/NAME, each of letters, digits, dots, hyphens and underscores")
