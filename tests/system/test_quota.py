"""A container's quota decides how many threads there are, unless the user does."""

import json
import os
import subprocess
import sys

import pytest

from dualhead.system.quota import CHOICES, fit_threads, processors, quota


def told(folder, **files):
    for name, text in files.items():
        path = folder.joinpath(*name.split("__"))
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name.replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu_max": "150000 100000\n"}, 1.5),
        ({"cpu_max": "max 100000\n"}, None),
        ({"cpu_max": "rubbish"}, None),
        ({"cpu__cpu_cfs_quota_us": "50000\n", "cpu__cpu_cfs_period_us": "100000\n"}, 0.5),
        ({"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_quota_is_what_the_kernel_tells(tmp_path, files, found):
    assert quota(told(tmp_path, **files)) == found


def test_processors_are_whole_at_least_one_and_no_more_than_there_are(tmp_path):
    here = processors(tmp_path)
    assert processors(told(tmp_path, cpu_max="1000 100000")) == 1
    assert processors(told(tmp_path, cpu_max="100000000 100000")) == here
    assert processors(told(tmp_path, cpu_max="110000 100000")) == min(here, 2)


def test_threads_fit_the_quota_and_who_says_their_number_is_obeyed(tmp_path):
    environment: dict[str, str] = {}
    fit_threads(environment, tmp_path)
    assert environment == {}, "without a quota nothing is changed"
    fit_threads(environment, told(tmp_path, cpu_max="100000 100000"))
    assert environment == {"OMP_NUM_THREADS": "1"}
    for name in CHOICES:
        kept = {name: "7"}
        fit_threads(kept, tmp_path)
        assert kept == {name: "7"}


def test_torch_sees_the_number(tmp_path):
    told(tmp_path, cpu_max="100000 100000")
    code = (
        "import pathlib, json, dualhead.system.quota as q;"
        f"q.fit_threads(folder=pathlib.Path({str(tmp_path)!r}));"
        "import torch; print(json.dumps(torch.get_num_threads()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == 1
