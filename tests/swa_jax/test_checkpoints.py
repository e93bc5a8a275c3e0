"""Averages of checkpoints on disk, against soups of what the real library loads."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy

import swa_jax
from swa_jax import __main__ as command
from swa_jax.averages import checkpoints

from .transformations import bits, structure

INDEX = "model.safetensors.index.json"


def tensors(seed: int) -> dict[str, np.ndarray]:
    """A model with a tensor of every kind that NumPy has."""
    rng = np.random.default_rng(seed)
    return {
        "layer.w": rng.normal(size=(7, 5)).astype(np.float32),
        "layer.b": rng.normal(size=3).astype(np.float16),
        "wide": rng.normal(size=4),
        "scalar": np.array(seed, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "steps": np.array([seed, 2 * seed]),
        "mask": np.array([seed % 2 == 0]),
    }


def write(folder: pathlib.Path, count: int = 3, **extra) -> list[pathlib.Path]:
    paths = [folder / f"step_{i}.safetensors" for i in range(1, count + 1)]
    for i, path in enumerate(paths, 1):
        safetensors.numpy.save_file({**tensors(i), **extra}, path, {"format": "np"})
    return paths


def shards(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The same model in two files, as transformers writes it."""
    folder.mkdir()
    model = tensors(seed)
    home = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(model)
    }
    for file in set(home.values()):
        mine = {name: model[name] for name in model if home[name] == file}
        safetensors.numpy.save_file(mine, folder / file, {"format": "np"})
    index = {"metadata": {"total_size": 1}, "weight_map": home}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def assert_soup(found: dict, models: list[dict], weights=None) -> None:
    """Bit for bit what ``soup`` makes of the loaded models, float64 apart."""
    assert found.keys() == models[0].keys()
    exact = [{k: v for k, v in m.items() if v.dtype != np.float64} for m in models]
    expected = swa_jax.soup(exact, weights)
    for name, leaf in expected.items():
        assert found[name].dtype == models[0][name].dtype
        assert bits(found[name]) == bits(np.asarray(leaf).astype(found[name].dtype))
    share = np.ones(len(models)) if weights is None else np.array(weights)
    wide = sum(s * m["wide"] for s, m in zip(share, models, strict=True)) / share.sum()
    np.testing.assert_allclose(found["wide"], wide, rtol=1e-14)


@pytest.mark.parametrize("block", [2**24, 12])
@pytest.mark.parametrize("weights", [None, [1, 2, 5], [-1, 1, 1.5]], ids=str)
def test_files(tmp_path, weights, block, monkeypatch):
    monkeypatch.setattr(checkpoints, "_BLOCK", block)  # 12: three elements at a time
    paths, out = write(tmp_path), tmp_path / "mean.safetensors"
    assert swa_jax.average_checkpoints(paths, str(out), weights=weights) == out
    assert_soup(
        safetensors.numpy.load_file(out), [tensors(i) for i in (1, 2, 3)], weights
    )
    with safetensors.safe_open(out, "numpy") as file:
        assert file.metadata() == {"format": "np"}
    assert sorted(tmp_path.iterdir()) == sorted([*paths, out])
    os.umask(umask := os.umask(0))
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_shards(tmp_path):
    paths = [shards(tmp_path / str(i), i) for i in (1, 2, 3)]
    out = swa_jax.average_checkpoints(paths, tmp_path / "mean")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == [*names, INDEX]
    index = json.loads((out / INDEX).read_text())
    found: dict[str, np.ndarray] = {}
    for name in names:
        part = safetensors.numpy.load_file(out / name)
        assert {index["weight_map"][key] for key in part} == {name}
        found |= part
    assert_soup(found, [tensors(i) for i in (1, 2, 3)])
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "mean"]


def test_a_file_and_shards_and_a_directory_together(tmp_path):
    (tmp_path / "hub").mkdir()
    one = tmp_path / "hub" / "model.safetensors"
    safetensors.numpy.save_file(tensors(1), one)
    paths = [tmp_path / "hub", shards(tmp_path / "two", 2)]
    out = swa_jax.average_checkpoints(paths, tmp_path / "out.safetensors")
    assert_soup(safetensors.numpy.load_file(out), [tensors(1), tensors(2)])


def test_narrow_dtypes(tmp_path):
    # NumPy's loader knows bfloat16 and float8 by ml_dtypes.
    dtypes = {"bf16": ml_dtypes.bfloat16, "f8": ml_dtypes.float8_e4m3fn}
    models = [
        {name: (i * np.arange(6) / 8).astype(dtype) for name, dtype in dtypes.items()}
        for i in (1, 3)
    ]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for model, path in zip(models, paths, strict=True):
        specs = {
            name: swa_jax._formats.Spec(x.dtype, x.shape) for name, x in model.items()
        }
        writer = swa_jax._formats._safetensors._FileWriter(path, specs, None)
        with writer:
            for name, x in model.items():
                writer.write(name, iter([x]))
            writer.finish()
    out = swa_jax.average_checkpoints(paths, tmp_path / "out.safetensors")
    found = swa_jax._formats.open_checkpoint(out)
    for name, dtype in dtypes.items():
        mean = (2 * np.arange(6) / 8).astype(dtype)
        assert bits(found.read(name, 0, 6)) == bits(mean)
    found.close()
    safetensors.safe_open(out, "numpy")  # the real library takes it


def test_dtype_and_keys(tmp_path):
    paths = write(tmp_path, 2)
    other = {**tensors(5), "layer.w": tensors(5)["layer.w"].astype(np.float16)}
    safetensors.numpy.save_file(other, paths[1])
    with pytest.raises(swa_jax.CheckpointError, match=r"'layer.w' is float16 \(7, 5\)"):
        swa_jax.average_checkpoints(paths, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    swa_jax.average_checkpoints(
        paths, out, dtype=jnp.float16, keys=lambda name: name != "wide"
    )
    found = safetensors.numpy.load_file(out)
    assert "wide" not in found
    assert found["layer.w"].dtype == np.float16
    assert found["steps"].dtype == np.int64
    mean = (tensors(1)["layer.w"].astype(np.float64) + other["layer.w"]) / 2
    np.testing.assert_allclose(found["layer.w"], mean, atol=2e-3)
    out = swa_jax.average_checkpoints(paths, tmp_path / "c", keys=["steps", "mask"])
    assert safetensors.numpy.load_file(out).keys() == {"steps", "mask"}


def damaged(name: str, path: pathlib.Path) -> None:
    data = path.read_bytes()
    model = tensors(2)
    if name == "truncated":
        path.write_bytes(data[:-5])
    elif name == "longer":
        path.write_bytes(data + b"12")
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "foreign":
        path.write_bytes(b"PK\x03\x04" + bytes(100))
    elif name == "header":
        path.write_bytes(data[:8] + b"[" + data[9:])
    elif name == "gap":
        path.write_bytes(data.replace(b'"shape":[7,5]', b'"shape":[7,4]'))
    elif name == "gone":
        path.unlink()
    elif name == "directory":
        path.unlink()
        path.mkdir()
    else:
        changed = {
            "missing": {k: v for k, v in model.items() if k != "steps"},
            "surplus": {**model, "extra": np.zeros(2)},
            "shape": {**model, "layer.w": np.zeros((5, 7), np.float32)},
            "dtype": {**model, "steps": model["steps"].astype(np.int32)},
            "nan": {
                **model,
                "layer.w": np.where(np.eye(7, 5) > 0, np.nan, 1).astype("f"),
            },
        }[name]
        safetensors.numpy.save_file(changed, path)


DAMAGES = {
    "truncated": (
        swa_jax.CheckpointError,
        r"step_2.*truncated, it has \d+ bytes",
    ),
    "longer": (swa_jax.CheckpointError, r"step_2.*damaged, it has \d+ bytes"),
    "empty": (swa_jax.CheckpointError, "step_2.*no safetensors file, or a truncated"),
    "foreign": (swa_jax.CheckpointError, "step_2.*no safetensors file"),
    "header": (swa_jax.CheckpointError, "step_2.*no JSON object"),
    "gap": (swa_jax.CheckpointError, "step_2.*damaged, the tensor 'layer.w'"),
    "gone": (FileNotFoundError, "step_2.*no such file"),
    "directory": (swa_jax.CheckpointError, "step_2.*a directory without model.safet"),
    "missing": (swa_jax.CheckpointError, "step_2.*lacks the tensor 'steps'.*step_1"),
    "surplus": (
        swa_jax.CheckpointError,
        "step_2.*has the tensor 'extra'.*step_1",
    ),
    "shape": (
        swa_jax.CheckpointError,
        r"step_2.*'layer.w' is float32 \(5, 7\), in",
    ),
    "dtype": (swa_jax.CheckpointError, r"step_2.*'steps' is int32 \(2,\), in .*int64"),
    "nan": (
        swa_jax.NonFiniteError,
        "step_2.*'layer.w' has a NaN or an infinity",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_averaged_is_named_and_nothing_is_written(tmp_path, damage):
    error, message = DAMAGES[damage]
    paths = write(tmp_path)
    damaged(damage, paths[1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        swa_jax.average_checkpoints(paths, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["file", "tensor", "surplus", "outside", "json"])
def test_shards_that_disagree_with_their_index(tmp_path, damage):
    path = shards(tmp_path / "m", 1)
    index = json.loads((path / INDEX).read_text())
    first = "model-00001-of-00002.safetensors"
    home = index["weight_map"]
    message = {
        "file": rf"{first}: not there, but named in {INDEX}",
        "tensor": f"{first}: lacks the tensor 'nowhere'",
        "surplus": f"{first}: holds the tensor 'layer.w', which {INDEX} does not name",
        "outside": "'../x.safetensors' is no name of a file in it",
        "json": f"{INDEX}: no index of shards",
    }[damage]
    if damage == "file":
        (path / first).unlink()
    elif damage == "tensor":
        home["nowhere"] = first
    elif damage == "surplus":
        del home["layer.w"]
    elif damage == "outside":
        home["layer.w"] = "../x.safetensors"
    (path / INDEX).write_text("{" if damage == "json" else json.dumps(index))
    with pytest.raises(swa_jax.CheckpointError, match=message):
        swa_jax.average_checkpoints([path], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_is_replaced(tmp_path):
    paths = write(tmp_path)
    for make in (lambda p: p.write_text("mine"), lambda p: p.symlink_to("nowhere")):
        out = tmp_path / "out.safetensors"
        make(out)
        with pytest.raises(FileExistsError, match="exists already; nothing is ev"):
            swa_jax.average_checkpoints(paths, out)
        assert out.is_symlink() or out.read_text() == "mine"
        out.unlink()
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        swa_jax.average_checkpoints(paths, tmp_path / "no" / "out.safetensors")


def test_one_that_comes_into_being_meanwhile_is_kept(tmp_path):
    paths, out = write(tmp_path), tmp_path / "out.safetensors"

    def progress(done, total):
        if done == total:
            out.write_text("theirs")

    with pytest.raises(FileExistsError):
        swa_jax.average_checkpoints(paths, out, progress=progress)
    assert out.read_text() == "theirs"
    assert sorted(tmp_path.iterdir()) == sorted([*paths, out])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ("one", {}, TypeError, "paths must be several, got 'one'"),
        ([], {}, ValueError, "paths is empty"),
        (2, {"weights": [1.0]}, ValueError, "weights has 1 numbers.* 2 models"),
        (2, {"weights": [1, -1]}, ValueError, "whose sum is not 0"),
        (2, {"dtype": "int8"}, TypeError, "dtype must be a floating dtype.*'int8'"),
        (2, {"keys": ["steps", "q"]}, swa_jax.CheckpointError, "lacks the tensor 'q'"),
        (
            2,
            {"keys": lambda name: False},
            swa_jax.CheckpointError,
            "chooses none",
        ),
    ],
    ids=["string", "none", "few", "zero", "dtype", "key", "no key"],
)
def test_wrong_arguments(tmp_path, arguments, options, error, message):
    paths = write(tmp_path, arguments) if isinstance(arguments, int) else arguments
    with pytest.raises(error, match=message):
        swa_jax.average_checkpoints(paths, tmp_path / "out.safetensors", **options)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a draft has a name there")
@pytest.mark.parametrize("kind", ["file", "shards"])
def test_killed_at_any_moment_it_leaves_no_trace(tmp_path, kind):
    large = {"large": np.zeros(3_000_000, np.float32)}
    if kind == "file":
        paths = write(tmp_path, 2, **large)
    else:
        paths = [shards(tmp_path / str(i), i) for i in (1, 2)]
    before = sorted(tmp_path.iterdir())
    script = (
        "import sys, time, swa_jax\n"
        "def progress(done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(60)\n"
        "swa_jax.average_checkpoints(sys.argv[2:], sys.argv[1], progress=progress)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out", *paths], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline()  # in the middle of it
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    paths = write(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"out.safetensors: it needs [\d,]+ bytes"):
        swa_jax.average_checkpoints(paths, tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


def test_drafts_with_a_name_leave_no_trace_either(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    paths, out = write(tmp_path), tmp_path / "out.safetensors"
    damaged("nan", paths[1])
    with pytest.raises(swa_jax.NonFiniteError):
        swa_jax.average_checkpoints(paths, out)
    assert sorted(tmp_path.iterdir()) == paths
    shutil.copy(paths[0], paths[1])
    swa_jax.average_checkpoints(paths, out)
    assert sorted(tmp_path.iterdir()) == sorted([*paths, out])


# Orbax.


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {"dense": {"w": rng.normal(size=(3, 2)).astype(np.float32)}},
        "list": [
            np.full(2, seed, ml_dtypes.bfloat16),
            np.arange(seed, seed + 2, dtype=np.int32),
        ],
        "step": np.asarray(seed, np.int32),
    }


def orbax(folder: pathlib.Path, seed: int) -> pathlib.Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree(seed))
    return folder


def assert_orbax(path: pathlib.Path, seeds: list[int], weights=None) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path)
    expected = swa_jax.soup([tree(seed) for seed in seeds], weights)
    assert structure(found) == structure(expected)
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("weights", [None, [3, 1, -1]], ids=str)
def test_orbax(tmp_path, weights):
    paths = [orbax(tmp_path / str(i), i) for i in (1, 2, 3)]
    out = swa_jax.average_checkpoints(paths, tmp_path / "mean", weights=weights)
    assert_orbax(out, [1, 2, 3], weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "mean"]


def test_orbax_manager_and_its_steps(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (2, 9, 10):
            manager.save(step, args=ocp.args.StandardSave(tree(step)))
        manager.wait_until_finished()
    root = tmp_path / "run"
    assert_orbax(swa_jax.average_checkpoints([root], tmp_path / "a"), [10])
    paths = [root / "2", root / "9" / "default"]
    assert_orbax(swa_jax.average_checkpoints(paths, tmp_path / "b"), [2, 9])
    assert run(tmp_path / "c", root, "--last", 2) == 0
    assert_orbax(tmp_path / "c", [9, 10])


def test_orbax_of_other_models(tmp_path):
    first = orbax(tmp_path / "1", 1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "2", {**tree(2), "more": np.zeros(2)})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(swa_jax.CheckpointError, match="2: has the tensor 'more'"):
        swa_jax.average_checkpoints([first, tmp_path / "2"], tmp_path / "out")
    (tmp_path / "2" / "_METADATA").write_text("{")
    with pytest.raises(swa_jax.CheckpointError, match="2: no whole Orbax checkpoint"):
        swa_jax.average_checkpoints([first, tmp_path / "2"], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    keys = lambda name: name.startswith("params")  # noqa: E731
    out = swa_jax.average_checkpoints([first], tmp_path / "part", keys=keys)
    with ocp.StandardCheckpointer() as checkpointer:
        assert bits(checkpointer.restore(out)) == bits(tree(1)["params"])


# The command.


def run(*arguments) -> int:
    return command.main(["average", *map(str, arguments)])


def test_command(tmp_path, capsys):
    paths, out = write(tmp_path), tmp_path / "out.safetensors"
    assert run(out, *paths, "--weights", 1, 2, 5) == 0
    models = [tensors(i) for i in (1, 2, 3)]
    assert_soup(safetensors.numpy.load_file(out), models, [1, 2, 5])
    assert "out.safetensors: the average of" in capsys.readouterr().out
    assert run(out, *paths) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("swa_jax average: ")
    assert captured.err.count("\n") == 1
    assert "exists already" in captured.err


def test_command_takes_the_last_by_number(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", 11)
    (tmp_path / "run" / "notes.txt").write_text("")
    out = tmp_path / "out.safetensors"
    assert run(out, tmp_path / "run", "--last", 3, "--decay", "1-sqrt") == 0
    weights = swa_jax.decay_weights("1-sqrt", 3)
    models = [tensors(i) for i in (9, 10, 11)]
    assert_soup(safetensors.numpy.load_file(out), models, weights.tolist())
    for arguments, message in {
        ("--last", 12): "--last 12: found 11 checkpoints",
        ("--last", 0): "--last must be at least 1",
        ("--last", 2, "--decay", "exp"): "decay must be one of",
        ("--last", 2, "--keys", "("): "no regular expression",
    }.items():
        assert run(tmp_path / "other", tmp_path / "run", *arguments) == 2
        assert message in capsys.readouterr().err


def test_command_line_runs_as_a_module(tmp_path):
    paths, out = write(tmp_path, 2), tmp_path / "out.safetensors"
    found = subprocess.run(
        [sys.executable, "-m", "swa_jax", "average", out, *paths, "--keys", "layer"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert safetensors.numpy.load_file(out).keys() == {"layer.w", "layer.b"}
