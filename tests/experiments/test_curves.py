import functools
import io
import json
import shutil

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments import __main__
from experiments.config.schema import FREE, override, settings_of
from experiments.jobs import width
from experiments.reporting import curves, report
from experiments.reporting.style import BLUE, GREEN, ORANGE
from experiments.runtime.errors import DataUnavailableError, StorageError
from experiments.runtime.metrics import LoggedArm, open_log, read_log
from experiments.runtime.workdir import Workdir
from tests.helpers import quiet, run_job


def arm(name, epochs, first_epoch=0, averages_from=None, parent=None):
    return {
        "name": name,
        "label": name.upper(),
        "epochs": epochs,
        "first_epoch": first_epoch,
        "averages_from": averages_from,
        "parent": parent,
        "steps_per_epoch": 10,
    }


def write(workdir, arms, dataset="digits", stop=None):
    """The log of a job, as far as epoch `stop` of its last arm."""
    header = {
        "config": {"name": dataset, "seeds": 2},
        "scored_by": "loss" if dataset == "shakespeare" else "accuracy",
        "arms": arms,
    }
    with open_log(Workdir(workdir), header) as log:
        for number, each in enumerate(arms):
            run = {"arm": each["name"], "seed": 0}
            last = stop if stop and number == len(arms) - 1 else each["epochs"]
            for epoch in range(each["first_epoch"] + 1, last + 1):
                step = 10 * (epoch - each["first_epoch"])
                rate = (1 + number) / epoch
                log.write("step", **run, step=step, batch_loss=1.0, learning_rate=rate)
                log.write("train", **run, epoch=epoch, step=step, batch_loss=1 / epoch)
                kinds = ["iterate"]
                if each["averages_from"] and epoch >= each["averages_from"]:
                    kinds.append("average")
                for weights in kinds:
                    better = 0.02 * (weights == "average")
                    accuracy = 0.9 - 0.8 / epoch + better - 0.01 * number
                    values = {"accuracy": accuracy, "loss": 3 - accuracy}
                    log.write("test", **run, epoch=epoch, weights=weights, **values)
            if last == each["epochs"]:
                log.write("finished", **run)
    return workdir


SIDE_BY_SIDE = [arm("sgd", 12), arm("swa2", 12, 0, 11), arm("swa4", 12, 0, 9)]
FINE_TUNE = [
    arm("converged", 8),
    arm("swa", 12, 8, 9, "converged"),
    arm("control", 12, 8, None, "converged"),
]


def pixels(content):
    return matplotlib.image.imread(io.BytesIO(content), format="png")[..., :3]


def hits(image, colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.all(np.abs(image - rgb) < 0.02, axis=-1)


@pytest.mark.parametrize(
    ("arms", "colours"),
    [(SIDE_BY_SIDE, (BLUE, ORANGE)), (FINE_TUNE, (BLUE, ORANGE, GREEN))],
)
@pytest.mark.parametrize("dataset", ["digits", "shakespeare"])
def test_curves_show_every_arm(tmp_path, arms, colours, dataset):
    log = read_log(write(tmp_path, arms, dataset) / "metrics.jsonl")
    image = pixels(curves.plot_curves(log))
    height, width, _ = image.shape
    assert (height >= 800, width >= 1000) == (True, True)
    for colour in colours:
        # In the panel of the rates above and in that of the scores below.
        assert hits(image[: height // 3], colour).sum() > 50, colour
        assert hits(image[height // 2 :], colour).sum() > 50, colour


@pytest.mark.parametrize("stop", [1, 9])
def test_a_job_at_work_has_curves_too(tmp_path, stop):
    log = read_log(write(tmp_path, SIDE_BY_SIDE[:1], stop=stop) / "metrics.jsonl")
    assert pixels(curves.plot_curves(log)).shape[2] == 3


def test_a_job_that_has_only_begun_has_empty_curves(tmp_path):
    header = {"config": {"name": "x"}, "arms": SIDE_BY_SIDE}
    with open_log(Workdir(tmp_path), header):
        pass
    log = read_log(tmp_path / "metrics.jsonl")
    assert log.arms[0] == LoggedArm(**SIDE_BY_SIDE[0])
    assert pixels(curves.plot_curves(log)).shape[2] == 3


def test_limits_show_the_end_of_training():
    low, high = curves._limits([80.0, 90.0], text=False)
    assert 75 < low < 80
    assert 90 < high < 93
    assert curves._limits([99.9, 100.0], text=False)[1] == 100.0


def test_report_tells_the_state_of_every_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    write(tmp_path, FINE_TUNE, stop=10)
    assert __main__.main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "config.json does not hold the settings of a job" in line_of(shown)
    rows = {
        line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line
    }
    assert "finished" in rows["converged seed 0"]
    assert "not begun" in rows["converged seed 1"]
    assert "epoch 10 of 12" in rows["control seed 0"]
    # An averaging arm's score is its average's: 0.9 - 0.8 / 12 + 0.02 - 0.01.
    assert "84.33" in rows["swa seed 0"]
    assert (tmp_path / "curves.png").is_file()
    assert not (tmp_path / "width.png").exists()


def test_report_of_no_job_is_an_error(tmp_path, capsys):
    assert __main__.main(["report", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(StorageError, match="name the --workdir of a job"):
        report.report(tmp_path, quiet())


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished job of one seed, without width.png."""
    workdir = tmp_path_factory.mktemp("job") / "run"
    config = override(tiny_model, workdir=workdir, seeds=1)
    run_job(config)
    return config


@pytest.fixture
def job(finished, tmp_path, monkeypatch):
    """A copy of it; what width.png shows is measured at few points."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    few = functools.partial(width.measure, num_rays=1, num_radii=2, grid=3)
    monkeypatch.setattr(width, "measure", few)
    return override(finished, workdir=tmp_path / "run")


def states(directory):
    """Of all that is there, when it was changed and how."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (directory, *directory.rglob("*"))
    }


def shown_of(job, capsys, *args):
    assert __main__.main(["report", str(job.workdir), *args]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_report_measures_what_width_shows_once(job, capsys, monkeypatch):
    before = states(job.workdir / "runs")
    assert "measuring the loss" in shown_of(job, capsys)
    assert states(job.workdir / "runs") == before
    measured = json.loads((job.workdir / "width.json").read_text())
    assert measured["labels"] == ["SGD", "SWA", "SWA's last iterate"]
    # A ray starts at the solution, which scores as it does in the table.
    rows = json.loads((job.workdir / "results.json").read_text())["rows"]
    (row,) = (row for row in rows if row["label"] == "SWA, last 3 epochs")
    error = measured["rays"]["surfaces"]["SWA"]["test_error"][0][0]
    assert error == pytest.approx(100 * (1 - row["accuracy"][0]), abs=1e-6)
    image = pixels((job.workdir / "width.png").read_bytes())
    assert hits(image, ORANGE).sum() > 100

    (job.workdir / "width.png").unlink()
    monkeypatch.setattr(report, "measure_width", lambda *_: pytest.fail("again"))
    assert "and width.png written to" in " ".join(shown_of(job, capsys).split())
    assert (job.workdir / "width.png").is_file()


@pytest.mark.slow
def test_report_beside_a_running_job(job, capsys):
    """The runs that the figure needs are finished, another one is at work."""
    (job.workdir / "results.json").unlink()
    shutil.rmtree(job.workdir / "runs" / "swa1-seed0")
    with job.directory.locked(settings_of(job), FREE):  # the job's lock
        before = states(job.workdir / "runs")
        shown = shown_of(job, capsys)
        assert states(job.workdir / "runs") == before
    assert "missing" not in shown
    assert (job.workdir / "width.png").is_file()


def line_of(shown):
    (line,) = (line for line in shown.splitlines() if "width.png is missing: " in line)
    return line


def test_report_says_which_run_width_waits_for(job, capsys, monkeypatch):
    monkeypatch.setattr(report, "measure_width", lambda *_: pytest.fail("too soon"))
    (job.workdir / "runs" / "swa3-seed0" / "finished.json").unlink()
    shown = shown_of(job, capsys)
    assert line_of(shown).endswith("it needs swa3-seed0, not finished yet")
    assert (job.workdir / "curves.png").is_file()
    assert not (job.workdir / "width.png").exists()


def test_report_measures_nothing_if_asked_not_to(job, capsys, monkeypatch):
    monkeypatch.setattr(report, "measure_width", lambda *_: pytest.fail("no"))
    assert "--no-width" in line_of(shown_of(job, capsys, "--no-width"))


def test_report_says_what_width_cannot_be_measured_from(job, capsys, monkeypatch):
    def absent(*args):
        raise DataUnavailableError("digits is not prepared")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "load_splits", absent)
        assert line_of(shown_of(job, capsys)).endswith(": digits is not prepared")
    for path in (job.workdir / "runs" / "sgd-seed0").rglob("*"):
        if path.is_file() and path.name != "finished.json":
            path.write_bytes(b"")
    assert "sgd-seed0" in line_of(shown_of(job, capsys))
    (job.workdir / "config.json").write_text("[]")
    assert "does not hold the settings of a job" in line_of(shown_of(job, capsys))


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_report_leaves_accelerators_to_a_job_at_work(
    tmp_path, capsys, monkeypatch, over, chosen
):
    if over:
        (tmp_path / "results.json").touch()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    if not chosen:
        monkeypatch.delenv("JAX_PLATFORMS")
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *args: updates.append(args))
    assert __main__.main(["report", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    assert updates == ([] if over or chosen else [("jax_platforms", "cpu")])


def test_log_of_other_bytes_is_an_error(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert __main__.main(["report", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "name the --workdir of a job" in shown
