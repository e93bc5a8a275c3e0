import dataclasses
import io
import json
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import rich.console
import safetensors
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file

from experiments import configs, data, export, plans, runs
from experiments.compare import train_and_evaluate
from experiments.networks import make_model

README = pathlib.Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def job(tiny_model, tmp_path_factory):
    """A finished job of one seed."""
    workdir = tmp_path_factory.mktemp("job") / "run"
    config = dataclasses.replace(tiny_model, workdir=workdir, seeds=1)
    train_and_evaluate(config, rich.console.Console(file=io.StringIO()))
    return config


def test_exported_network_is_the_averaged_one(job, capsys):
    assert export.main([str(job.workdir)]) == 0
    out = job.workdir / "export"
    variables = unflatten_dict(load_file(out / "model.safetensors"), sep="/")
    assert set(variables) == {"params", "batch_stats"}
    splits = data.load_splits(job, ("train", "test"))
    # As README shows it.
    model = make_model(configs.from_json(metadata(out)["config"]), splits["test"])
    images, labels = splits["test"].examples
    logits = model.apply(variables, images, train=False)
    accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
    rows = json.loads((job.workdir / "results.json").read_text())["rows"]
    (row,) = (r for r in rows if r["label"] == "SWA, last 3 epochs")
    assert accuracy == pytest.approx(row["accuracy"][0], abs=1e-9)
    assert f"test accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
    # Not by accident that of the last iterate.
    swa = plans.make_arms(job)[-1]
    compiled = export.compile_arm(job, swa, splits["train"])
    state = runs.final_state(job, compiled, 0)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert np.any(np.asarray(kernel) != state.params["Dense_0"]["kernel"])

    restored = ocp.StandardCheckpointer().restore((out / "orbax").absolute())
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


def test_readme_shows_how_to_load_it(job, capsys):
    export.main([str(job.workdir)])
    (snippet,) = re.findall(r"```py\n(.*?)```", README.read_text(), re.DOTALL)
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
    assert configs.from_json(found["config"]) == job
    export.export(job.workdir, out, "swa3")  # replaces it
    assert metadata(out)["arm"] == "swa3"
    assert {path.name for path in out.iterdir()} == {"orbax", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"there"}  # no drafts left


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arm", "sgd"], "arm is sgd; of this job, swa1, swa3 average weights"),
        (["--seed", "7"], "swa3-seed7 is not a finished run"),
    ],
)
def test_what_cannot_be_exported_is_an_error(job, args, message, capsys):
    assert export.main([str(job.workdir), *args]) == 1
    assert message in capsys.readouterr().err


def test_directory_without_a_job_is_an_error(tmp_path, capsys):
    assert export.main([str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "config.json does not hold the settings of a job" in shown
