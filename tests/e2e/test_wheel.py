import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import dualhead
from dualhead.recipe import load_recipe, shipped_recipes
from dualhead.data import load_split
from pathlib import Path

assert str(Path(dualhead.__file__)).startswith({site!r}), dualhead.__file__
assert len(load_split("digits", "train")) + len(load_split("digits", "test")) == 1797
for name in shipped_recipes():
    load_recipe(name)
assert len(shipped_recipes()) >= 13
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from what git would hand out, so that a file somebody forgot to add is missed here and not by a user.
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    names = [name for name in tracked.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("not in a git checkout")
    for name in names:
        if name.startswith("src/") or "/" not in name:
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "tree"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = SCRIPT.format(site=str(site))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(site), "DUALHEAD_CACHE": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_wheel_carries_licences_and_typing(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dualhead/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "dualhead/data/digits/README.md" in names  # the data's own licence asks for attribution
