"""Averages of Flax's msgpack files, against soups of what Flax itself loads."""

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import train_state

import swa_jax
from swa_jax._formats import _msgpack
from swa_jax.averages import checkpoints

from .transformations import bits, structure


def model(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "dense": {"w": rng.normal(size=(7, 5)).astype(np.float32)},
            "half": rng.normal(size=3).astype(ml_dtypes.bfloat16),
            "scalar": np.array(seed, np.float32),
            "numpy": np.float32(seed),
            "empty": np.zeros((0, 3), np.float32),
            "complex": rng.normal(size=2).astype(np.complex64),
        },
        "list": [np.arange(seed, seed + 2), {"mask": np.array([seed % 2 == 0])}],
        "step": seed,
        "below": -1000 * seed,
        "above": 2**63 + seed,
        "flag": seed % 2 == 0,
        "name": "a name of more than thirty-two characters",
        "nothing": None,
        "bytes": b"\x00\x01",
    }


def write(folder, count=3, make=model):
    paths = [folder / f"checkpoint_{i}" for i in range(1, count + 1)]
    for i, path in enumerate(paths, 1):
        path.write_bytes(serialization.to_bytes(make(i)))
    return paths


def soup(seeds, weights=None):
    """In the form that Flax restores: lists are maps, and numbers Python's."""
    models = [serialization.to_state_dict(model(seed)) for seed in seeds]
    other = ("step", "below", "above", "flag", "name", "nothing", "bytes")
    last = {name: models[-1].pop(name) for name in other}
    arrays = [{k: m[k] for k in ("params", "list")} for m in models]
    averaged = swa_jax.soup(arrays, weights)
    # 64 bits, which JAX would cut.
    averaged["list"] = models[-1]["list"]
    return averaged | last


@pytest.mark.parametrize("block", [2**22, 12])
@pytest.mark.parametrize("weights", [None, [1, 2, 5]], ids=str)
def test_files(tmp_path, weights, block, monkeypatch):
    monkeypatch.setattr(checkpoints, "_BLOCK", block)
    paths, out = write(tmp_path), tmp_path / "mean"
    swa_jax.average_checkpoints(paths, out, weights=weights)
    found = serialization.msgpack_restore(out.read_bytes())
    expected = soup([1, 2, 3], weights)
    assert structure(found) == structure(expected)
    assert bits(found) == bits(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
    assert type(found["params"]["numpy"]) is np.float32
    assert [type(found[name]) for name in ("step", "flag")] == [int, bool]
    restored = serialization.from_bytes(model(1), out.read_bytes())
    assert restored["list"][1]["mask"] == model(3)["list"][1]["mask"]
    assert sorted(tmp_path.iterdir()) == sorted([*paths, out])


def test_floats_of_python_are_averaged_in_float64(tmp_path):
    paths = write(tmp_path, 3, lambda i: {"w": np.zeros(2), "rate": 0.1 * i})
    out = swa_jax.average_checkpoints(paths, tmp_path / "out", weights=[1, 1, 2])
    found = serialization.msgpack_restore(out.read_bytes())["rate"]
    assert type(found) is float
    np.testing.assert_allclose(found, (0.1 + 0.2 + 0.6) / 4, rtol=1e-15)


def test_train_state(tmp_path):
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    tx = optax.chain(optax.adam(0.1), swa_jax.swa())
    state = train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=tx)
    states = []
    for i in range(3):
        state = state.apply_gradients(grads=jax.tree.map(jnp.cos, state.params))
        states.append(state)
        (tmp_path / f"{i}.msgpack").write_bytes(serialization.to_bytes(state))
    paths = sorted(tmp_path.iterdir())
    out = swa_jax.average_checkpoints(paths, tmp_path / "out.msgpack")
    found = serialization.from_bytes(state, out.read_bytes())
    assert bits(found.params) == bits(swa_jax.soup([s.params for s in states]))
    assert found.step == 3
    part = tmp_path / "part.msgpack"
    swa_jax.average_checkpoints(paths, part, keys=lambda name: name.startswith("param"))
    restored = serialization.msgpack_restore(part.read_bytes())
    assert restored.keys() == {"params"}
    assert bits(restored["params"]) == bits(found.params)


@pytest.mark.parametrize("limit", [16, 20, 2**30])
def test_tensors_in_parts(tmp_path, limit, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(_msgpack, "_MAX_PART", limit)
    paths = write(tmp_path)
    has_parts = b"__msgpack_chunked_array__" in paths[0].read_bytes()
    assert has_parts == (limit < 2**30)
    out = swa_jax.average_checkpoints(paths, tmp_path / "mean")
    assert (b"__msgpack_chunked_array__" in out.read_bytes()) == has_parts
    found = serialization.msgpack_restore(out.read_bytes())
    assert bits(found) == bits(soup([1, 2, 3]))


def test_dtype_and_another_kind(tmp_path):
    (tmp_path / "flax").mkdir()
    first = tmp_path / "flax" / "flax_model.msgpack"
    first.write_bytes(serialization.to_bytes({"a": {"w": np.ones(3, np.float16)}}))
    second = tmp_path / "b.msgpack"
    second.write_bytes(serialization.to_bytes({"a": {"w": np.full(3, 4.0, "f")}}))
    paths = [tmp_path / "flax", second]
    with pytest.raises(swa_jax.CheckpointError, match=r"'a.w' is float32 \(3,\), in"):
        swa_jax.average_checkpoints(paths, tmp_path / "out")
    out = swa_jax.average_checkpoints(paths, tmp_path / "out", dtype=jnp.bfloat16)
    found = serialization.msgpack_restore(out.read_bytes())["a"]["w"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, np.full(3, 2.5, ml_dtypes.bfloat16))
    # What comes first says what the output is: safetensors of a name with a dot.
    import safetensors.numpy

    third = tmp_path / "c.safetensors"
    safetensors.numpy.save_file({"a.w": np.full(3, 8, "f")}, third)
    out = swa_jax.average_checkpoints([third, second], tmp_path / "mixed")
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(out)["a.w"], np.full(3, 6.0)
    )


def test_a_tensor_under_two_names_is_averaged_under_each(tmp_path):
    """Scripts that add in place count what two names share twice."""

    def make(i):
        shared = np.full(3, i, np.float32)
        return {"embed": shared, "head": shared, "own": np.full(2, i, np.float32)}

    out = swa_jax.average_checkpoints(write(tmp_path, 3, make), tmp_path / "out")
    found = serialization.msgpack_restore(out.read_bytes())
    for leaf in found.values():
        np.testing.assert_array_equal(leaf, np.full_like(leaf, 2))


def packed(tensor: bytes) -> bytes:
    return msgpack.packb({"w": msgpack.ExtType(1, tensor)})


DAMAGES = {
    "truncated": (lambda d: d[:-5], "truncated one: it has"),
    "empty": (lambda d: b"", "truncated one: it has 0 bytes, where 1 are needed"),
    "longer": (lambda d: d + b"\x00", "goes on after its end"),
    "text": (lambda d: b"\x81\xa1\xff\x01", "no text ends at byte 3"),
    "byte": (lambda d: b"\x81\xa1w\xc1", "byte 4 begins nothing"),
    "key": (lambda d: b"\x81\x01\x01", "a key at byte 2 is no text"),
    "twice": (lambda d: b"\x82\xa1w\x01\xa1w\x02", "has the key 'w' twice"),
    "endless": (lambda d: b"\x91" * 100_000, "maps in maps without end"),
    "counts": (lambda d: b"\xdf\xff\xff\xff\xff", "truncated"),
    "without": (lambda d: msgpack.packb({"a": None}), "holds no tensor"),
    "complex": (lambda d: serialization.to_bytes({"c": 1j}), "extension of type 2"),
    "size": (lambda d: packed(msgpack.packb(([3], "float32", bytes(8)))), "no tensor"),
    "dtype": (lambda d: packed(msgpack.packb(([1], "U1", bytes(4)))), "dtype 'U1'"),
    "foreign": (lambda d: packed(msgpack.packb([1, 2])), "no tensor of dtype None"),
    "missing": (
        lambda d: serialization.to_bytes(
            {k: v for k, v in model(2).items() if k != "step"}
        ),
        "lacks the tensor 'step'",
    ),
    "integer": (
        lambda d: serialization.to_bytes({**model(2), "step": 2.0}),
        r"'step' is float64 \(\), in .*int64 \(\)",
    ),
    "parts": (
        lambda d: msgpack.packb(
            {"w": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {}}}
        ),
        "the parts of a tensor make no whole",
    ),
    "names": (
        lambda d: serialization.to_bytes({"a.b": np.ones(1), "a": {"b": np.ones(1)}}),
        "two tensors of the name 'a.b'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_averaged_is_named_and_nothing_is_written(tmp_path, damage):
    change, message = DAMAGES[damage]
    paths = [path.rename(path.with_suffix(".msgpack")) for path in write(tmp_path)]
    paths[1].write_bytes(change(paths[1].read_bytes()))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(swa_jax.CheckpointError, match=f"checkpoint_2.*{message}"):
        swa_jax.average_checkpoints(paths, tmp_path / "out.msgpack")
    assert sorted(tmp_path.iterdir()) == before


def test_every_truncation_is_noticed(tmp_path):
    [path] = write(tmp_path, 1)
    data = path.read_bytes()
    cut = tmp_path / "cut.msgpack"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(swa_jax.CheckpointError):
            _msgpack.MsgpackFile(cut)


def test_nan_is_named(tmp_path):
    paths = write(tmp_path, 2, lambda i: {"a": {"w": np.array([1, np.nan])}, "b": 1.0})
    with pytest.raises(swa_jax.NonFiniteError, match=r"checkpoint_1.*'a.w' has a NaN"):
        swa_jax.average_checkpoints(paths, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == paths
