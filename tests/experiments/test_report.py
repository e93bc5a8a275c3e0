import dataclasses
import io
import json

import matplotlib.image
import numpy as np
import pytest
import rich.console

from experiments import report
from experiments.evaluate import Evaluation

ROWS = [
    report.Row("sgd", 0, False, [0.97, 0.98, 0.99], [0.1, 0.2, 0.3]),
    report.Row("swa", 5, True, [0.991, 0.991, 0.991], [0.05, 0.05, 0.05]),
    report.Row("swa", 10, False, [0.5, 0.6, 0.7], [1.0, 2.0, 3.0]),
]


def make_curves(epochs=12, window=4):
    steps = 3 * epochs
    rates = np.linspace(0.1, 0.0, steps)
    climb = [0.9 - 0.8 / epoch for epoch in range(1, epochs + 1)]
    return report.Curves(
        epochs=epochs,
        swa_epochs=window,
        sgd_rates=rates,
        swa_rates=np.maximum(rates, 0.05),
        sgd=climb,
        swa_iterates=[value - 0.05 for value in climb],
        swa_average=[0.88, 0.89, 0.9, 0.9],
    )


def test_standard_deviation_is_that_of_a_sample():
    # Deviations -1, 0, 1: variance 2 / (3 - 1) = 1; dividing by 3 would give 0.82.
    assert report.mean_and_std([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert report.mean_and_std([0.98765], 4) == "0.9877"


def test_markdown():
    assert report.make_markdown(ROWS) == (
        "| Method | Test accuracy (%) | Test loss |\n"
        "|---|---:|---:|\n"
        "| SGD | 98.00 ± 1.00 | 0.2000 ± 0.1000 |\n"
        "| SWA, last 5 epochs | 99.10 ± 0.00 | 0.0500 ± 0.0000 |\n"
        "| SWA, last 10 epochs, no BatchNorm pass | 60.00 ± 10.00 | 2.0000 ± 1.0000 |\n"
    )


def test_table_shows_every_row(tiny):
    console = rich.console.Console(file=io.StringIO(), width=120)
    console.print(report.make_table(tiny, ROWS))
    shown = console.file.getvalue()
    assert "digits: test split, 4 epochs, mean ± sample std of 2 seeds" in shown
    for text in ("98.00 ± 1.00", "SWA, last 5 epochs", "2.0000 ± 1.0000"):
        assert text in shown


def test_row_collects_seeds():
    row = report.Row("swa", 5, True)
    row.add(Evaluation(0.9, 0.5))
    row.add(Evaluation(0.8, 0.6))
    assert (row.accuracy, row.loss) == ([0.9, 0.8], [0.5, 0.6])
    assert report.Row("swa", 5, True).accuracy == []


def test_report_files(tiny):
    report.write_report(tiny, ROWS, make_curves())
    results = json.loads((tiny.workdir / "results.json").read_text())
    assert set(results) == {"config", "rows"}
    assert set(results["config"]) == {f.name for f in dataclasses.fields(tiny)}
    assert results["config"]["swa_epochs"] == [1, 3]
    assert results["config"]["workdir"] == str(tiny.workdir)
    assert results["rows"][0] == {
        "method": "sgd",
        "swa_epochs": 0,
        "bn_recomputed": False,
        "accuracy": [0.97, 0.98, 0.99],
        "loss": [0.1, 0.2, 0.3],
    }
    written = {path.name for path in tiny.workdir.iterdir()}
    assert written == {"results.json", "results.md", "curves.png"}  # no drafts left


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    report.write_json(path, {"old": 1})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}


def test_plot_draws_both_arms(tiny):
    content = report.plot_curves(tiny, make_curves())
    pixels = matplotlib.image.imread(io.BytesIO(content), format="png")[..., :3]
    height, width, _ = pixels.shape
    assert width >= 1000
    assert height >= 800
    colours = {"blue": (0x1F, 0x77, 0xB4), "orange": (0xD9, 0x48, 0x0F)}
    for name, colour in colours.items():
        hits = np.all(np.abs(pixels - np.array(colour) / 255) < 0.02, axis=-1)
        # In the panel of the rates above and in that of the accuracies below.
        assert hits[: height // 3].sum() > 100, name
        assert hits[height // 3 :].sum() > 100, name


def test_plot_limits_show_the_end_of_training():
    low, high = report._accuracy_limits(make_curves())
    assert 50 < low < 85  # not the first epochs' 10 %
    assert 90 < high < 93
