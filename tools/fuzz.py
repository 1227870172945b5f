"""Feed rubbish to every way in, guided by coverage, and say how much was tried and what was found.

    python tools/fuzz.py --minutes 60          # all targets in turn (needs `pip install atheris`)

Each target runs in a process of its own, in which libFuzzer ends an input that takes longer than 30 s or more than
2 GiB. What breaks the promise of `tests/fuzz/fuzz_targets.py` is written to the folder of findings, once for each
place in the code where it arises.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
TOKENS = (
    *("extends:", "name:", "stages:", "data:", "model:", "threat:", "epochs:", "pgd-10", "trades", "*a", "&a", "<<"),
    *("!!int", "!!python/object", ".inf", ".nan", "-1", "1e999", "0x", "2021-02-30", "~", "{}", "[]", "null", "8/255"),
    *("..", "/", "%s", "_type", "ClassLabel", "Image", "Sequence", "names", "dtype", "features"),
)


def fuzz_one(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Fuzz one target in this process; it does not return, since libFuzzer ends the process."""
    import atheris

    sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]
    with atheris.instrument_imports(include=["dualhead", "datasets.features"]):
        from fuzz_targets import TARGETS
    check, seeds = TARGETS[name]
    corpus = folder / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(content)
    dictionary = folder / name / "tokens"
    dictionary.write_text("".join(f'"{token}"\n' for token in TOKENS))
    logging.disable()
    places: set[str] = set()

    def run(data: bytes) -> None:
        try:
            check(data)
        except Exception as error:  # whatever it is, it is a finding
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__} " + " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
            if place not in places:
                places.add(place)
                finding = folder / name / f"finding-{seed}-{len(places)}"
                finding.write_bytes(data)
                finding.with_suffix(".txt").write_text(f"{place}\n\n{traceback.format_exc()}")

    words = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", "-timeout=30", "-rss_limit_mb=2560"]
    words += [
        "-max_len=20000",
        f"-dict={dictionary}",
        f"-artifact_prefix={folder / name}/ended-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *words, str(corpus)], run)
    atheris.Fuzz()


def tried_in(log: str) -> int:
    """How many inputs libFuzzer says that it ran."""
    done = [line.split()[-1] for line in log.splitlines() if line.startswith("stat::number_of_executed_units")]
    if done:
        return int(done[-1])
    counts = [line.split()[0][1:] for line in log.splitlines() if line.startswith("#")]  # it ended before its time
    return int(counts[-1]) if counts else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "dualhead-fuzz")
    parser.add_argument("--target", help="one of them; default: all in turn")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        fuzz_one(options.target, options.minutes * 60, options.seed, options.findings)
    sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]
    from fuzz_targets import TARGETS

    names = [options.target] if options.target else list(TARGETS)
    environment = {**os.environ, "DUALHEAD_CACHE": "/dev/null", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    tried = dict.fromkeys(names, 0)
    for name in names:
        until = time.monotonic() + 60 * options.minutes / len(names)
        seed = 0
        while (left := until - time.monotonic()) > 1:
            seed += 1
            command = [sys.executable, __file__, "--target", name, "--seed", str(seed)]
            command += ["--minutes", str(left / 60), "--findings", str(options.findings)]
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", check=False
            )
            tried[name] += tried_in(ended.stderr)
            (options.findings / name / f"log-{seed}.txt").write_text(ended.stderr[-20_000:])
            print(f"{name}: {tried[name]:,} inputs, status {ended.returncode}", flush=True)
    found = sorted(str(path) for path in options.findings.glob("*/*") if path.name.startswith(("finding", "ended")))
    print(json.dumps({"tried": tried, "in all": sum(tried.values()), "findings": found}, indent=2))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
