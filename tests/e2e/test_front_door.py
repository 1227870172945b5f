"""README and results are short, their numbers and pictures are those measured, and links lead on."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualhead.recipe import load_recipe, shipped_recipes
from dualhead.runs.folder import MAY_CHANGE

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "strongest.json").read_text())
ELSEWHERE = json.loads((ROOT / "benchmarks" / "results" / "elsewhere.json").read_text())
RESULTS_PAGE = (ROOT / "docs" / "results.md").read_text()
CODE = re.compile(r"^```.*?^```", re.M | re.S)
FAST = "autoattack-fast"


@functools.cache
def committed():
    """Paths that a clone has, as far as git can tell; folders too."""
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("no git checkout")
    files = [Path(line) for line in told.stdout.splitlines() if (ROOT / line).exists()]
    return {str(path) for file in files for path in (file, *file.parents)}


@functools.cache
def anchors(page):
    """Ids of the headings of a page, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", CODE.sub("", page.read_text()), re.M):
        words = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def dead(page):
    """Links of a page that lead nowhere on GitHub."""
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(ROOT) and str(file.relative_to(ROOT)) in committed()
        if not inside or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead_on_github(page):
    assert list(dead(page)) == []


def test_a_dead_link_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "committed", lambda: {"page.md", "other.md"})
    (tmp_path / "other.md").write_text("# One `word`\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#one-word) [c](other.md#no-heading) [d](gone.md) [e](../x.md)")
    assert list(dead(page)) == ["other.md#no-heading", "gone.md", "../x.md"]


def test_readme_is_short_and_comes_to_python_soon():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    before = text[: text.index("```python")].splitlines()
    assert len(before) <= 45  # a screen and a half, the picture counted as fifteen lines
    assert len((ROOT / "docs" / "results.md").read_text().split()) <= 1200


def test_pictures_and_tables_are_made_from_what_was_measured():
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "tools" / "make_figures.py")
    figures = importlib.util.module_from_spec(spec)
    sys.modules["make_figures"] = figures  # its data classes look for it there
    spec.loader.exec_module(figures)
    for path, made in figures.made().items():
        assert path.read_text(encoding="utf-8") == made, f"{path.name}: run `python tools/make_figures.py`"
    shown = (ROOT / "README.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    assert all(f"images/{name}.svg" in shown for name in ("trade-off", "equal-cost", "cost", "dhat"))


# ---- the tables of README and results, held against the committed numbers

AGAIN, FIRST = "trades over beta at equal cost, float32", "trades and sat"
LONG_12, GUIDED_6 = "trades-base-long-beta-12", "trades-distilled-beta-6"
ANSWERS = {
    "**Base: TRADES, beta 12**": (AGAIN, LONG_12, None),
    "`cifar10_cpu_guided_distillation`": (AGAIN, GUIDED_6, LONG_12),
    "the same, `stages.distilled.deploy=head2`": (AGAIN, f"{GUIDED_6}, head 2", LONG_12),
    "**Base: TRADES, beta 6**": (FIRST, "trades-base-long", None),
    "`cifar10_cpu_guided_distillation stages.guided.objective.head1.beta=3`": (
        FIRST, "trades-distilled", "trades-base-long",
    ),
    "two TRADES models, averaged (`cpu_ensemble.yaml`)": (FIRST, "trades-ensemble", None),
    "**Base: TRADES, beta 6, half as long**": (FIRST, "trades-base", None),
    "`cifar10_cpu_guided`: stage 1 alone, head 1 deployed": (FIRST, "trades-guided", "trades-base"),
    "`cifar10_cpu`: DH-AT, the paper's stages": (FIRST, "trades-dhat", "trades-base"),
    "**Base: SAT, its better length**": (FIRST, "sat-base", None),
    "guided distillation (`sat-distilled`)": (FIRST, "sat-distilled", "sat-base"),
    "`cifar10_cpu_sat`: DH-AT": (FIRST, "sat-dhat", "sat-base"),
    "**Base: MART**": ("mart", "mart-base", None),
    "guided distillation, half length (`mart-distilled-short`)": ("mart", "mart-distilled-short", "mart-base"),
    "`cifar10_cpu_mart`: DH-AT": ("mart", "mart-dhat", "mart-base"),
    "`cifar10_resnet18_guided_distillation`": None,
}  # fmt: skip
"""First cell of each row of the answer table; section of the results, study, and the base it is held against."""
README_ROWS = {
    "guided distillation less TRADES": (AGAIN, GUIDED_6, LONG_12),
    "its head 2 alone less TRADES": (AGAIN, f"{GUIDED_6}, head 2", LONG_12),
    "guided distillation less SAT": (FIRST, "sat-distilled", "sat-base"),
    "guided distillation less MART": ("mart", "mart-distilled-short", "mart-base"),
    "DH-AT less TRADES": (FIRST, "trades-dhat", "trades-base"),
}
COST_OF_AN_ANSWER = {77_850: "1", 155_700: "2", 179_526: "1.6"}
"""By the parameters of the model, in forward passes of the base model."""


def table(page, heading):
    """Cells of the first table below a heading, by their first one."""
    below = (ROOT / page).read_text().partition(f"## {heading}\n")[2]
    lines = [line for line in below.partition("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def study(section, name):
    return next(row for row in RESULTS[section]["rows"] if row["name"].split(":")[0] == name)


def difference(name, reference, accuracy):
    """A paired difference, unrounded where it was kept so."""
    pairs = [
        pair for content in RESULTS.values() for pair in content.get("pairs", [])
        if (pair["name"], pair["reference"], pair["accuracy"]) == (name, reference, accuracy)
    ]  # fmt: skip
    several = [pair for pair in pairs if "seeds" in pair["test"]]
    return several[0]


def agrees(cell, values):
    """Whether the numbers of a cell are these, rounded to a tenth of a point."""
    written = [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]
    return len(written) == len(values) and all(
        abs(number - 100 * value) <= 0.05 + 1e-6 for number, value in zip(written, values, strict=True)
    )


def check_differences(cells, name, reference):
    for cell, accuracy in zip(cells, ("clean", FAST), strict=True):
        pair = difference(name, reference, accuracy)
        assert agrees(cell, (pair["difference"], *pair["interval"])), (name, accuracy, cell, pair)


def test_the_answer_table_is_what_was_measured():
    rows = table("docs/results.md", "The answer")
    assert set(rows) == set(ANSWERS)
    unit = study(FIRST, "trades-base")["training_cost"]["flops"]
    for label, where in ANSWERS.items():
        clean, robust, *differences, seeds, training, answer, verdict = rows[label]
        if where is None:
            assert [clean, robust, *differences, seeds, training] == ["", "", "", "", "0", ""]
            assert verdict == "not measured"
            continue
        section, name, reference = where
        of = study(section, name)
        assert agrees(clean, [of["clean_accuracy"]]), label
        assert agrees(robust, [of["robust_accuracy"][FAST]]), label
        assert int(seeds) == len(of["seeds"]), label
        assert abs(float(training) - of["training_cost"]["flops"] / unit) < 0.06, label
        assert answer == COST_OF_AN_ANSWER[of["parameters"]], label
        if reference is None:
            assert differences == ["", ""]
            continue
        check_differences(differences, name, reference)
        ends = [difference(name, reference, accuracy)["interval"] for accuracy in ("clean", FAST)]
        gains, losses = [low > 0 for low, _ in ends], [high < 0 for _, high in ends]
        expected = {
            (True, True, False): "gain shown", (False, True, False): "robust gain shown",
            (False, True, True): "a trade", (False, False, True): "clean lost", (False, False, False): "no gain shown",
        }  # fmt: skip
        assert verdict == expected[(*gains, losses[0])], label


def test_the_table_of_the_readme_is_what_was_measured():
    rows = table("README.md", "Does it help?")
    assert set(rows) == set(README_ROWS)
    unit = study(FIRST, "trades-base")["training_cost"]["flops"]
    for label, (section, name, reference) in README_ROWS.items():
        clean, robust, training, answer = rows[label]
        check_differences((clean, robust), name, reference)
        costs = [study(section, of)["training_cost"]["flops"] / unit for of in (name, reference)]
        told = [float(number) for number in re.findall(r"[\d.]+", training)]
        assert all(abs(number - cost) < 0.06 for number, cost in zip(told * (3 - len(told)), costs, strict=True)), label
        assert answer == COST_OF_AN_ANSWER[study(section, name)["parameters"]]


def test_what_was_kept_rounded_agrees_with_what_was_not():
    """Differences and seeds that were kept to a tenth of a point, against the means and against one another."""
    from scipy import stats

    seeds = RESULTS["rounded: per seed"]["runs"]
    sections = {"trades": FIRST, "sat": FIRST, "mart": "mart"}
    for name, told in seeds.items():
        of = study(sections[name.split("-")[0]], name)
        means = {"clean": of["clean_accuracy"], FAST: of["robust_accuracy"][FAST]}
        for accuracy, values in told.items():
            assert abs(sum(values) / 3 - 100 * means[accuracy]) <= 0.06, (name, accuracy)
    for pair in RESULTS["rounded: other references"]["pairs"]:
        ends, accuracy = pair["interval"], pair["accuracy"]
        assert ends[0] <= pair["difference"] <= ends[1]
        if accuracy == "pgd-40" or "seed 0" in pair["test"]:
            continue
        gained = [b - a for a, b in zip(seeds[pair["reference"]][accuracy], seeds[pair["name"]][accuracy], strict=True)]
        mean = sum(gained) / 3
        spread = (sum((value - mean) ** 2 for value in gained) / 2) ** 0.5
        reach = float(stats.t.ppf(0.975, 2)) * spread / 3**0.5
        assert abs(mean - 100 * pair["difference"]) <= 0.15, pair
        assert abs(reach - 50 * (ends[1] - ends[0])) <= 0.45, pair  # seeds rounded to 0.1 move it by that much


def test_the_page_on_other_data_is_what_was_measured():
    told = ELSEWHERE["tiny"]["compare"]
    base, guided = "base-80-beta-12", "guided-80-beta-6"
    unit = told["rows"][0]["training_cost"]["flops"]
    names = ["base-40-beta-12", base, guided, f"{guided}, head 2"]
    lines = re.findall(r"^\| .*\d.* \|$", (ROOT / "docs/results/other-data.md").read_text(), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for (label, cost, clean, robust), name in zip(rows[:4], names, strict=True):
        row = next(row for row in told["rows"] if row["name"] == name)
        assert abs(float(cost) - row["training_cost"]["flops"] / unit) < 0.06, label
        assert agrees(clean, (row["clean_accuracy"], *row["intervals"]["clean_accuracy"])), label
        assert agrees(robust, (row["robust_accuracy"][FAST], *row["intervals"][FAST])), label
    for (label, clean, robust, answer), name in zip(rows[4:], told["differences"], strict=True):
        pairs = told["differences"][name]
        for cell, accuracy in ((clean, "clean"), (robust, FAST)):
            assert agrees(cell, (pairs[accuracy]["difference"], *pairs[accuracy]["interval"])), label
        assert answer == told["answers"][name], label
    pairs = told["differences"][f"{guided} less {base} (equal cost)"]
    summary = re.search(r"20 classes of Tiny ImageNet.*?: (.*?)\n?\s*clean, (.*?) robust", RESULTS_PAGE, re.DOTALL)
    assert summary is not None
    for cell, accuracy in zip(summary.groups(), ("clean", FAST), strict=True):
        assert agrees(cell, (pairs[accuracy]["difference"], *pairs[accuracy]["interval"]))


def test_the_pages_lead_to_every_page():
    listed = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    made = {"index.md", "api.md", "contributing.md", "changelog.md"}  # by tools/docs_pages.py
    assert pages | made == listed


def test_the_keys_that_may_change_while_a_run_goes_on_are_told():
    told = re.search(r"only these\s+keys\s+may change: (.*?)\.\n\n", (ROOT / "docs" / "faq.md").read_text(), re.S)
    recipe = load_recipe("digits").resolved()
    keys = [f"{part}.{key}" for part in ("data", "evaluate", "runtime") for key in recipe[part]]
    keys += [f"stages.0.{key}" for key in recipe["stages"][0]]
    assert told is not None
    free = {key.removeprefix("stages.0.") for key in keys if MAY_CHANGE.fullmatch(key)}
    assert set(re.findall(r"`([\w.]+)`", told[1])) == free


def test_choosing_names_every_recipe():
    text = (ROOT / "docs" / "choosing.md").read_text().partition("## A base method")[0]
    base_methods = re.compile(r"_(sat|mart)$")  # "the same names with `_sat` or `_mart`"
    assert [name for name in shipped_recipes() if not base_methods.search(name) and f"`{name}" not in text] == []


def test_what_the_answer_table_tells_to_type_is_what_was_measured():
    shipped = load_recipe("cifar10_cpu_guided_distillation")
    ran = load_recipe(str(ROOT / "benchmarks/strongest/cpu_distilled.yaml"), ["stages.guided.objective.head1.beta=6"])
    assert (shipped.data, shipped.model, shipped.stages) == (ran.data, ran.model, ran.stages)
