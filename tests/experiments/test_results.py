import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess

import jax
import numpy as np
import pytest
import scipy.stats

from experiments.config.schema import settings_of
from experiments.jobs import results
from experiments.jobs.results import Row
from experiments.jobs.run import Score
from experiments.reporting import tables
from experiments.reporting.tables import Results
from experiments.runtime import files
from experiments.runtime.tables import mean_and_std
from experiments.training.any_budget import AnyBudget
from tests.helpers import quiet, run_job, told


def row(label, arm, epoch, accuracy, loss, weights="iterate", method="sgd"):
    return Row(label, method, arm, epoch, weights, accuracy, loss, [0.1] * len(loss))


ROWS = [
    row("SGD", "sgd", 4, [0.97, 0.98, 0.99], [0.1, 0.2, 0.3]),
    row("SWA", "swa1", 4, [0.98, 0.98, 1.0], [0.1, 0.1, 0.1], "average", "swa"),
]


def test_standard_deviation_is_that_of_a_sample():
    # Deviations -1, 0, 1: variance 2 / (3 - 1) = 1; dividing by 3 would give 0.82.
    assert mean_and_std([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_and_std([0.98765], 4) == "0.9877"
    assert mean_and_std([1.0, math.inf], 2) == "inf"  # a seed that diverged


def test_comparison_is_a_paired_test_over_seeds(tiny):
    (found,) = results.compare(ROWS, tiny.plan)
    assert (found.row, found.against) == ("SWA", "SGD")
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(-0.1)
    a, b = np.array(ROWS[1].accuracy), np.array(ROWS[0].accuracy)
    oracle = scipy.stats.ttest_rel(a, b)
    # By hand: differences 1, 0, 1 have mean 2/3, deviation sqrt(1/3), so t = 2.
    assert found.accuracy_t == pytest.approx(2.0)
    assert found.accuracy_t == pytest.approx(oracle.statistic)
    assert found.accuracy_p == pytest.approx(oracle.pvalue)


def test_averages_meet_plain_training_as_long_and_their_parent(tiny_fine_tune):
    plan = tiny_fine_tune.plan
    rows = list(results.make_rows(plan).values())
    rng = np.random.default_rng(0)
    for each in rows:
        for _ in range(2):
            each.add(Score(*rng.random(3)))
    pairs = {(c.row, c.against) for c in results.compare(rows, plan)}
    assert pairs == {
        ("SWA, 1 more epoch", "SGD, 4 epochs"),
        ("SWA, 1 more epoch", "control, 1 more epoch (0.01)"),
        ("SWA, 1 more epoch", "SGD, 5 epochs"),
        ("SWA, 3 more epochs", "SGD, 4 epochs"),
        ("SWA, 3 more epochs", "control, 3 more epochs (0.01)"),
        ("SWA, 3 more epochs", "SGD, 7 epochs"),
        ("SWA, 3 more epochs", "SWA's last iterate (0.05)"),
    }


def test_equal_differences_have_no_test(tiny):
    same = [row("SGD", "sgd", 4, [0.5, 0.5], [1.0, 2.0])]
    same += [row("SWA", "swa1", 4, [0.6, 0.6], [1.0, 2.0], "average", "swa")]
    (found,) = results.compare(same, tiny.plan)
    assert np.isnan(found.accuracy_p)
    assert np.isnan(found.loss_p)


def test_one_seed_has_no_test(tiny):
    one = [row(r.label, r.arm, 4, [0.5], [1.0], r.weights, r.method) for r in ROWS]
    assert results.compare(one, tiny.plan) == []


def test_markdown(tiny):
    comparisons = results.compare(ROWS, tiny.plan)
    assert tables.make_markdown(Results("digits", ROWS, comparisons)) == (
        "| Method | Test accuracy (%) | Test loss | Train loss |\n"
        "|---|---:|---:|---:|\n"
        "| SGD | 98.00 ± 1.00 | 0.2000 ± 0.1000 | 0.1000 ± 0.0000 |\n"
        "| SWA | 98.67 ± 1.15 | 0.1000 ± 0.0000 | 0.1000 ± 0.0000 |\n"
        "\n"
        "| Average | Against | Accuracy (points) | Loss (nats) |\n"
        "|---|---|---:|---:|\n"
        "| SWA | SGD | +0.67 (t 2.0, p 0.184) | -0.1000 (t -1.7, p 0.225) |\n"
    )


def test_tables_show_every_row(tiny):
    console = quiet()
    comparisons = results.compare(ROWS, tiny.plan)
    for table in tables.make_tables(Results("digits", ROWS, comparisons)):
        console.print(table)
    shown = told(console)
    assert "digits: test split, mean ± sample std of 3 seeds" in shown
    for text in ("98.00 ± 1.00", "0.1000 ± 0.0000", "+0.67 (t 2.0, p 0.184)"):
        assert text in shown


def test_row_collects_seeds():
    one, other = (Row("SGD", "sgd", "sgd", 4, "iterate") for _ in range(2))
    one.add(Score(0.9, 0.5, 0.1))
    one.add(Score(0.8, 0.6, 0.2))
    assert (one.accuracy, one.loss) == ([0.9, 0.8], [0.5, 0.6])
    assert one.train_loss == [0.1, 0.2]
    assert other.accuracy == []


def test_calibration_is_a_column_where_every_row_has_it():
    with_it = [dataclasses.replace(each, ece=[0.01, 0.02, 0.03]) for each in ROWS]
    text = tables.make_markdown(Results("digits", with_it, []))
    assert text.startswith(
        "| Method | Test accuracy (%) | Test loss | Train loss | ECE (%) |\n"
        "|---|---:|---:|---:|---:|\n"
        "| SGD | 98.00 ± 1.00 | 0.2000 ± 0.1000 | 0.1000 ± 0.0000 | 2.00 ± 1.00 |\n"
    )
    text = tables.make_markdown(Results("digits", [with_it[0], ROWS[1]], []))
    assert "ECE" not in text


def test_budgets_are_columns(tiny):
    protocol = AnyBudget(epochs=2, read_at=(1, 2), swa_lr=0.1, averages=("ema:0.9",))
    plan = dataclasses.replace(tiny, protocol=protocol).plan
    rows = list(results.make_rows(plan).values())
    for each in rows:
        value = each.epoch / 10 + 0.01 * (each.weights != "iterate")
        each.add(Score(value, 1 - value, 0.0))
        each.add(Score(value + 0.01 * each.epoch, 0.9 - value, 0.0))
    comparisons = results.compare(rows, plan)
    text = tables.make_markdown(Results("any_budget", rows, comparisons))
    accuracy, loss, points, nats = text.split("\n\n")
    assert accuracy.splitlines() == [
        "| Test accuracy (%), by epochs | 1 | 2 |",
        "|---|---:|---:|",
        "| 0.1 cooled down | 10.50 ± 0.71 | 21.00 ± 1.41 |",
        "| SGD | 10.50 ± 0.71 | 21.00 ± 1.41 |",
        "| last iterate (0.1) | 10.50 ± 0.71 | 21.00 ± 1.41 |",
        "| mean of every epoch | 11.50 ± 0.71 | 22.00 ± 1.41 |",
        "| EMA 0.9 | 11.50 ± 0.71 | 22.00 ± 1.41 |",
    ]
    assert "| SGD | 0.8500 ± 0.0707 | 0.7500 ± 0.0707 |" in loss
    assert "| EMA 0.9 - SGD | +1.00 (" in points
    assert "| EMA 0.9 - 0.1 cooled down | -0.010 (" in nats


@pytest.mark.slow
def test_results_hold_the_configuration_every_seed_and_their_origin(tiny):
    rows = run_job(tiny)
    found = json.loads((tiny.workdir / "results.json").read_text())
    assert found["config"] == settings_of(tiny)
    assert found["config"]["swa_epochs"] == [1, 3]
    assert found["config"]["workdir"] == str(tiny.workdir)
    assert {len(row["accuracy"]) for row in rows} == {2}
    origin = found["provenance"]
    for name, version in origin["versions"].items():
        if name != "python":
            assert version == importlib.metadata.version(name)
    assert origin["versions"]["python"] == platform.python_version()
    assert origin["devices"] == f"{jax.device_count()} x cpu"
    assert (origin["processes"], origin["cores"] > 0) == (1, True)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    head = done.stdout.strip()
    assert (origin["commit"] or "").removesuffix("-dirty") == head
    # Seconds of all six runs.
    runs = [
        json.loads(p.read_text()) for p in tiny.workdir.glob("runs/*/finished.json")
    ]
    assert len(runs) == 6
    assert found["seconds"] == pytest.approx(sum(run["seconds"] for run in runs))
    assert not [path for path in tiny.workdir.iterdir() if path.suffix[1:].isdigit()]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    files.write_json(path, {"old": 1})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
