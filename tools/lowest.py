"""Install the lower bounds of pyproject.toml into a fresh environment, and try there what people do first.

    python tools/lowest.py            # in a temporary folder
    python tools/lowest.py FOLDER     # in FOLDER/venv, which is kept, and used again if it is there

Every dependency is installed at the lowest version that pyproject.toml allows, except for torch: wheels of its lower
bound for every platform and Python would be gigabytes, so it has the version of constraints.txt. What the dependencies
need in turn is as pip chooses. Extras (tensorboard, onnx) and the developers' tools are not tried.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ("torch",)
"""What has the version of constraints.txt."""
TINY = (
    "stages.*.epochs=1", "data.train_limit=200", "data.validation=50", "evaluate.limit=20",
    "evaluate.attacks=[fgsm]", "runtime.lanes=1",
    "runtime.layout=contiguous", "runtime.precision=float32", "runtime.device=cpu",
)  # fmt: skip
PICTURES = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
for part in ("train", "test"):
    for number in range(40):
        folder = Path(sys.argv[1]) / part / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 128, (8, 8, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
"""
PARQUET = """
import sys
import datasets
for part in ("train", "test"):
    datasets.load_dataset("imagefolder", data_dir=sys.argv[1], split=part).to_parquet(f"{sys.argv[2]}/{part}.parquet")
"""


def lower_bounds() -> list[str]:
    """Return the dependencies of pyproject.toml at their lower bounds, `name==version`, without those in `PINNED`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for dependency in project["dependencies"]:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)(?:,.*)?", dependency)
        if match is None:
            raise SystemExit(f"pyproject.toml: {dependency!r} has no lower bound, as in name>=1.0")
        if match[1] not in PINNED:
            found.append(f"{match[1]}=={match[2]}")
    return found


def call(*words: str | Path, cwd: Path = ROOT) -> None:
    """Run a program, show its line, and end with its output if it fails."""
    line = [str(word) for word in words]
    print("$", " ".join(word if "\n" not in word else "..." for word in line), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DUALHEAD_CACHE": str(cwd / "cache")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nfailed with {done.returncode}: {' '.join(line)}")


def install(folder: Path) -> Path:
    """Make the environment; return its Python."""
    if not (folder / "pyvenv.cfg").is_file():
        venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (python, "-m", "pip", "install", "--quiet")
    call(*pip, "--constraint", ROOT / "constraints.txt", *PINNED)
    call(*pip, *lower_bounds())
    call(*pip, "--no-deps", ROOT)
    call(python, "-m", "pip", "check")
    return python


def try_out(python: Path, place: Path) -> None:
    """Train on three kinds of data, and use what was trained."""
    dualhead = (python, "-W", "error::DeprecationWarning:dualhead", "-m", "dualhead")
    call(*dualhead, "--help", cwd=place)
    for command in ("train", "evaluate", "export", "compare", "sweep", "list"):
        call(*dualhead, command, "--help", cwd=place)
    pictures = place / "pictures"
    call(python, "-c", PICTURES, pictures, cwd=place)
    (place / "parquet").mkdir()
    call(python, "-c", PARQUET, pictures, place / "parquet", cwd=place)
    call(*dualhead, "train", "digits", *TINY, "--run-dir", "digits", cwd=place)
    for source in ("pictures", "parquet"):
        words = (f"data.source={source}", "data.validation=10", "stages.*.batch_size=10", "model.attach_at=block1")
        small = (*words, "model.backbone=wideresnet-10-1", "data.train_limit=null", "data.augment=[flip]")
        call(*dualhead, "train", "digits", *TINY, *small, "--run-dir", f"run_{source}", cwd=place)
    for command in ("evaluate", "info", "report"):
        call(*dualhead, command, "digits", cwd=place) if command != "evaluate" else call(
            *dualhead, command, "digits", "--attack", "pgd-2", "--limit", "20", cwd=place
        )
    call(*dualhead, "train", "digits", *TINY, "runtime.seed=1", "--run-dir", "other", cwd=place)
    call(*dualhead, "compare", "digits", "other", cwd=place)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        python = install(Path(sys.argv[1]).resolve() / "venv" if sys.argv[1:] else Path(temporary) / "venv")
        (Path(temporary) / "place").mkdir()
        try_out(python, Path(temporary) / "place")
    print(f"works with torch of constraints.txt and {', '.join(lower_bounds())}")


if __name__ == "__main__":
    main()
