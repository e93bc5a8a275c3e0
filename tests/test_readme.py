"""README's claims that can be run: its examples, its commands, its names, its table."""

import ast
import importlib.metadata
import itertools
import pathlib
import re
import statistics
import tomllib
from typing import Any

import pytest

import swa_jax
from experiments.reporting import tables
from experiments.runtime.workdir import Workdir
from tests.test_requirements import parse

ROOT = pathlib.Path(__file__).parent.parent
CI = (ROOT / ".ci" / "run").read_text()
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "results.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)


def printed(text: str) -> dict[str, float]:
    """The accuracies that an example prints, by what it calls them."""
    lines = (line.rpartition(" ") for line in text.strip().splitlines())
    return {label: float(value) for label, _, value in lines}


def run(example: str, name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(example, name, "exec"), namespace)
    return namespace


def test_the_example_runs_as_it_stands(capsys):
    (example,) = EXAMPLES
    run(example, "README's example")
    found = printed(capsys.readouterr().out)
    assert len(found) == 3
    for accuracy in found.values():
        # Chance is 0.1; a single model of this size gets about 0.9 on these writers.
        assert 0.85 < accuracy <= 1.0
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    # Ten of the 297 images: CPUs round differently, and training goes on from it.
    assert found == pytest.approx(printed(shown), abs=10 / 297)


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 150


def test_install_line_installs_what_the_first_example_imports():
    assert README.index(COMMANDS[0]) < README.index(EXAMPLES[0])
    command, library, *names = COMMANDS[0].removeprefix("pip ").split()
    assert (command, library) == ("install", ".")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {parse(each)[0] for each in project["dependencies"] + names}
    distributions = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for node in ast.walk(ast.parse(EXAMPLES[0])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {"flax", "jax", "sklearn.datasets"} < imported
    for module in {name.partition(".")[0] for name in imported} - {"swa_jax"}:
        assert installed & {parse(each)[0] for each in distributions[module]}, module


def test_ci_runs_the_very_test_command():
    (test_command,) = (c for c in COMMANDS if c.endswith("-m pytest"))
    assert "\n" not in test_command
    assert test_command in CI.splitlines()


def test_ci_runs_every_test():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    addopts = options["ini_options"]["addopts"]
    selections = [
        addopts[addopts.index("-m") + 1],
        *re.findall(r'pytest -m "?([^"\n]*)', CI),
    ]
    assert len(selections) == 3
    for slow, aot in itertools.product((False, True), repeat=2):
        marks = {"slow": slow, "aot": aot}
        assert any(eval(selection, {}, marks) for selection in selections), marks


def test_every_public_name_is_explained():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in swa_jax.__all__:
        assert f"`{name}" in page, f"docs/api.md does not mention {name}"
        assert getattr(swa_jax, name).__doc__, f"{name} has no docstring"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert "docs/results.md" in targets
    for target in targets:
        assert (ROOT / target).exists(), f"README links to {target}"


# The results: a row for each directory of docs/results but some.

SUMMARY = {
    cells[0].split()[0]: cells
    for cells in re.findall(
        r"^\| `(?!python)(.+?)` \|" + r" ?(.*?) \|" * 6 + "$",
        PAGE[PAGE.index("## Where it does not pay") :],
        re.MULTILINE,
    )
}
RESULTS = {path.name: path for path in sorted((ROOT / "docs/results").iterdir())}


def read_results(name: str) -> tables.Results:
    return tables.Results.read(Workdir(RESULTS[name]))


NOISY = {"0 %": "noisy_labels_0", "20 %": "noisy_labels_20", "40 %": "noisy_labels"}
APART = {*NOISY.values(), *(name for name in RESULTS if name.startswith("any_budget"))}


def test_summary_has_a_row_for_each_experiment():
    assert SUMMARY.keys() == RESULTS.keys() - APART
    assert len(SUMMARY) == 5


def test_noisy_labels_are_those_of_the_results():
    found = {noise: read_results(name) for noise, name in NOISY.items()}
    cells = {
        noise: {c[0]: c for c in tables.table_cells(results.rows)}
        for noise, results in found.items()
    }
    shown = README[README.index("| Labels drawn at random |") :]
    titles = [cell.strip() for cell in shown.splitlines()[0].strip("|").split("|")]
    assert titles[1:] == [*found, "loss at 40 %", "ECE at 40 %"]
    rows = re.findall(r"^\| ([^|]+?) \|(.+)\|$", shown, re.MULTILINE)[1:7]
    assert len(rows) == 6
    for label, rest in rows:
        last = cells["40 %"][label]
        expected = [*(cells[noise][label][1] for noise in found), last[2], last[4]]
        assert [cell.strip() for cell in rest.split("|")] == expected
    # What is said of them: p of SWA and SWAG against SGD stopped early, at 40 %.
    tested = {
        c.row: c for c in found["40 %"].comparisons if c.against == "SGD, stopped early"
    }
    for row in ("SWA, last 10 epochs", "SWAG, 30 samples"):
        assert f"{tested[row].accuracy:+.2f} points" in README
    assert f"points (p {tested['SWA, last 10 epochs'].accuracy_p:.3f})," in README


def test_rates_of_a_noisy_validation_split_are_told_as_measured(tmp_path):
    recorded = RESULTS["noisy_labels"] / "results_noisy_validation.json"
    (tmp_path / "results.json").write_bytes(recorded.read_bytes())
    cells = tables.table_cells(tables.Results.read(Workdir(tmp_path)).rows)
    expected = {c[0]: [c[1], c[2], c[4]] for c in cells}
    shown = PAGE[PAGE.index("On the test split these rates score") :]
    rows = re.findall(r"^\| ([^|]+?) \| (\d[^|]+?) \|(.+)\|$", shown, re.MULTILINE)[:5]
    assert len(rows) == 5
    for label, accuracy, rest in rows:
        found = [accuracy, *(cell.strip() for cell in rest.split("|"))]
        assert found == expected[label]


@pytest.mark.parametrize("name", [n for n in RESULTS if n not in APART])
def test_summary_is_that_of_the_results(name):
    _, rows, comparisons = read_results(name)
    by_label = {row.label: row for row in rows}
    (swa,) = (r for r in rows if r.weights == "average" and "10" in r.label)
    accuracy, against = {"swa": tables.table_cells([swa])[0][1]}, {}
    for comparison in comparisons:
        other = by_label[comparison.against]
        if comparison.row != swa.label or other.arm == swa.arm:
            continue
        kind = other.arm if other.arm in ("converged", "control") else "scratch"
        accuracy[kind] = tables.table_cells([other])[0][1]
        (cells,) = tables.comparison_cells([comparison])
        against[kind] = re.sub(r"\(t .*?, ", "(", cells[2])
    kinds = ("converged", "control", "scratch")
    assert accuracy.keys() - {"swa"} in (set(kinds), {"scratch"})
    assert SUMMARY[name][1:] == (
        *(accuracy.get(kind, "") for kind in kinds),
        accuracy["swa"],
        *(against.get(kind, "") for kind in kinds[1:]),
    )


def test_what_the_batch_norm_pass_is_worth_is_that_of_the_results():
    lost = []
    for name in RESULTS:
        means = {
            row.weights: 100 * statistics.fmean(row.accuracy)
            for row in read_results(name).rows
        }
        if "average, no BatchNorm pass" in means:
            lost.append(means["average"] - means["average, no BatchNorm pass"])
    text = " ".join(PAGE.split())
    assert f"the same weights lose {min(lost):.0f} to {max(lost):.0f} points" in text
