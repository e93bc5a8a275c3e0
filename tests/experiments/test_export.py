import errno
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file

from experiments import __main__
from experiments.config.named import DIGITS
from experiments.config.schema import from_settings, override
from experiments.jobs.main import Trainer
from experiments.jobs.run import final_state
from experiments.reporting import export
from experiments.runtime.errors import DataError, StorageError
from tests.helpers import memory_splits, run_job
from tests.swa_jax.transformations import structure

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "experiments.md"


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory):
    """A finished job of one seed."""
    workdir = tmp_path_factory.mktemp("job") / "run"
    config = override(tiny_model, workdir=workdir, seeds=1)
    run_job(config)
    return config


@pytest.mark.slow
def test_exported_network_is_the_averaged_one(job, capsys):
    assert __main__.main(["export", str(job.workdir)]) == 0
    out = job.workdir / "export"
    variables = unflatten_dict(load_file(out / "model.safetensors"), sep="/")
    assert set(variables) == {"params", "batch_stats"}
    splits = memory_splits(job.data, ("train", "test"))
    model = job.network
    images, labels = splits["test"].examples
    logits = model.apply(variables, images, train=False)
    accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
    rows = json.loads((job.workdir / "results.json").read_text())["rows"]
    (row,) = (r for r in rows if r["label"] == "SWA, last 3 epochs")
    assert accuracy == pytest.approx(row["accuracy"][0], abs=1e-9)
    assert f"test accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
    # Not by accident that of the last iterate.
    compiled = Trainer(job, splits).compile(job.plan.longest)
    state = final_state(job.directory, compiled, 0)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert np.any(np.asarray(kernel) != state.params["Dense_0"]["kernel"])

    restored = ocp.StandardCheckpointer().restore((out / "orbax").absolute())
    assert structure(restored) == structure(variables)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


def test_page_shows_how_to_load_it(job, capsys):
    __main__.main(["export", str(job.workdir)])
    (snippet,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "runs/digits" in snippet
    capsys.readouterr()
    exec(snippet.replace("runs/digits", str(job.workdir)), {})
    accuracy = float(capsys.readouterr().out.split()[-1])
    expected = metadata(job.workdir / "export")["test_accuracy"]
    assert accuracy == pytest.approx(float(expected), abs=1e-6)


def metadata(out):
    with safetensors.safe_open(out / "model.safetensors", "flax") as file:
        found = file.metadata()
    return {**found, "config": json.loads(found["config"])}


def test_export_says_what_it_is(job, tmp_path):
    out, _ = export.export(job.workdir, tmp_path / "there", "swa1")
    found = metadata(out)
    assert (found["experiment"], found["arm"], found["seed"]) == ("digits", "swa1", "0")
    assert from_settings(DIGITS, found["config"]) == job
    export.export(job.workdir, out, "swa3")  # replaces it
    assert metadata(out)["arm"] == "swa3"
    assert {path.name for path in out.iterdir()} == {"orbax", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"there"}  # no drafts left


PARAMS = {"Dense_0": {"kernel": np.ones((2, 3), np.float32)}}


def write_export(out, value="1"):
    with export._becoming(out) as draft:
        export._write(draft, PARAMS, {}, {"experiment": "digits", "value": value})


def contents(directory):
    return {
        str(path.relative_to(directory)): path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


def thesis(out):
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "thesis.tex").write_text("years of work")


def foreign_model(out):
    """Another program's directory with the names of ours."""
    (out / "orbax").mkdir(parents=True)
    safetensors.numpy.save_file({"x": np.ones(1)}, out / "model.safetensors")


def with_notes(out):
    write_export(out)
    (out / "notes.txt").write_text("which run this was")


@pytest.mark.parametrize("fill", [thesis, foreign_model, with_notes])
def test_what_is_not_an_export_is_never_replaced(job, tmp_path, capsys, fill):
    fill(tmp_path / "precious")
    (tmp_path / "link").symlink_to("precious")
    before = contents(tmp_path)
    for out in ("precious", "link"):
        with pytest.raises(StorageError, match="something other than an earlie"):
            write_export(tmp_path / out)
        assert (
            __main__.main(["export", str(job.workdir), "--out", str(tmp_path / out)])
            == 1
        )
        shown = capsys.readouterr().err
        assert "name a directory that is empty or not there" in shown
        assert shown.count("\n") == 1
    assert contents(tmp_path) == before


def test_an_empty_directory_and_an_export_are_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for value in ("1", "2"):
        write_export(out, value)
        with safetensors.safe_open(out / "model.safetensors", "numpy") as file:
            assert file.metadata()["value"] == value
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_export(out)
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.safetensors.numpy, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot be written .* No space left"):
        write_export(out)
    monkeypatch.undo()
    replace = os.replace

    def refuse(source, target):
        if pathlib.Path(target) == out and ".old" not in str(source):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(export.os, "replace", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        write_export(out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "under a file", "/dev/null/x"])
def test_where_no_directory_can_be_is_an_error(
    job, tmp_path, capsys, kind, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("mine")
    out = {"a file": file, "under a file": file / "a" / "b"}.get(kind, kind)
    # Told before the data set is read and the BatchNorm pass made.
    monkeypatch.setattr(export, "load_splits", lambda *args: pytest.fail("too late"))
    assert __main__.main(["export", str(job.workdir), "--out", str(out)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: out is ")
    assert shown.count("\n") == 1
    assert file.read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[1]", '{"step": 1}', '{"scores": {"a": 1}}'])
@pytest.mark.parametrize("name", ["config.json", "runs/swa3-seed0/finished.json"])
def test_damaged_files_of_a_job_are_errors(job, tmp_path, capsys, content, name):
    workdir = tmp_path / "copy"
    shutil.copytree(job.workdir, workdir)
    (workdir / name).write_text(content)
    assert __main__.main(["export", str(workdir)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {workdir / name} ")
    assert shown.count("\n") == 1


def test_data_that_cannot_be_had_are_an_error(job, tmp_path, capsys, monkeypatch):
    def damaged(*args, **kwargs):
        raise DataError("train-images is damaged: reinstall it.")

    monkeypatch.setattr(export, "load_splits", damaged)
    assert (
        __main__.main(["export", str(job.workdir), "--out", str(tmp_path / "out")]) == 1
    )
    assert capsys.readouterr().err == "error: train-images is damaged: reinstall it.\n"
    assert not list(tmp_path.iterdir())


def test_network_of_many_devices_is_exported_on_one(job, tmp_path):
    """Where a job was trained says nothing of where it is exported."""
    workdir = tmp_path / "copy"
    shutil.copytree(job.workdir, workdir)
    content = json.loads((workdir / "config.json").read_text())
    content["parallel"] = "jit"
    content["batch_size"] = 9  # not a multiple of the eight devices here
    (workdir / "config.json").write_text(json.dumps(content))
    out, _ = export.export(workdir)
    assert metadata(out)["config"]["parallel"] == "jit"
    expected = load_file(export.export(job.workdir)[0] / "model.safetensors")
    found = load_file(out / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arm", "sgd"], "arm is sgd; of this job, swa1, swa3 average weights"),
        (["--seed", "7"], "swa3-seed7 is not a finished run"),
    ],
)
def test_what_cannot_be_exported_is_an_error(job, args, message, capsys):
    assert __main__.main(["export", str(job.workdir), *args]) == 1
    assert message in capsys.readouterr().err


def test_directory_without_a_job_is_an_error(tmp_path, capsys):
    assert __main__.main(["export", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "config.json does not hold the settings of a job" in shown
