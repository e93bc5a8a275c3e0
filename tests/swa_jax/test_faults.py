"""Faults of stores and of weights, one at a time; docs/faults.md names these tests.

``test_any_order`` has them in any order. What is expected here is what was saved, bit
for bit, or NumPy's mean in float64.
"""

import collections
import os
import pathlib
import re
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import swa_jax

from .transformations import Case, U, bits, counters, every_method, loop, structure

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text()
MODELS: list[dict[str, Any]] = [
    {"w": np.arange(6, dtype=np.float32) + t, "n": np.int32(t)} for t in range(4)
]


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    # No row of a table without one.
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in (row for row in rows if not row.startswith("| Fault |")):
        assert re.search(r"`[\w/]+\.py::\w+`", row), row
    for path, name in named:
        text = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{path}::{name}"


# Checkpoints that are not whole.


@every_method
def test_half_a_msgpack_is_refused_wherever_it_ends(case):
    state = loop(Case(case.method).make(), MODELS)
    data = flax.serialization.to_bytes(state)
    before = bits(state)
    for end in range(0, len(data), 7):
        with pytest.raises(Exception):  # noqa: B017 - msgpack's own, of many types
            flax.serialization.from_bytes(state, data[:end])
    assert bits(state) == before
    assert bits(flax.serialization.from_bytes(state, data)) == before


# Orbax drops its event loop when reading fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every_method
def test_half_an_orbax_checkpoint_is_refused_and_the_one_before_is_whole(
    case, tmp_path
):
    states = [loop(Case(case.method).make(), MODELS[:n]) for n in (2, 4)]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        for name, state in zip("ab", states, strict=True):
            checkpointer.save(tmp_path / name, state)
            checkpointer.wait_until_finished()
        files = [x for x in (tmp_path / "b").rglob("d/*") if x.is_file()]
        assert files
        for path in files:
            os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ValueError, match="d/"):
            checkpointer.restore(tmp_path / "b", states[1])
        restored = checkpointer.restore(tmp_path / "a", states[1])
    assert bits(restored) == bits(states[0])


# What a store cannot hold is its own error, and nothing of the run is lost.


def test_msgpack_takes_no_named_chain_but_its_links():
    tx = optax.named_chain(("sgd", optax.sgd(0.1)), ("mean", swa_jax.swa()))
    opt_state = tx.init(MODELS[0])
    with pytest.raises(TypeError, match="OrderedDict"):
        flax.serialization.to_bytes(opt_state)
    _, opt_state = tx.update(MODELS[1], opt_state, MODELS[1])
    data = flax.serialization.to_bytes(dict(opt_state))
    restored = flax.serialization.from_bytes(dict(tx.init(MODELS[0])), data)
    assert bits(restored) == bits(dict(opt_state))
    again = collections.OrderedDict((name, restored[name]) for name in opt_state)
    assert structure(again) == structure(opt_state)


def test_orbax_takes_no_empty_arrays(tmp_path):
    state = swa_jax.init_average({"empty": jnp.zeros((0, 2)), "w": jnp.ones(2)})
    with (
        orbax.checkpoint.StandardCheckpointer() as checkpointer,
        pytest.raises(ValueError, match="zero size"),
    ):
        checkpointer.save(tmp_path / "state", state)
    data = flax.serialization.to_bytes(state)
    assert bits(flax.serialization.from_bytes(state, data)) == bits(state)


# Weights.


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_without_the_option_a_bad_weight_spoils_its_own_place_alone(case, bad):
    spoilt = {**MODELS[1], "w": MODELS[1]["w"].copy()}
    spoilt["w"][2] = bad
    models = [MODELS[0], spoilt, MODELS[2], MODELS[3]]
    state = loop(Case(case.method).make(), models)
    assert tuple(map(int, counters(state))) == (4, 4)
    found = swa_jax.averaged_params(state, MODELS[3], case.method.state)
    weights = case.method.weights(4)
    expected = np.tensordot(weights, np.array([x["w"] for x in MODELS], np.float64), 1)
    places = np.arange(6) != 2
    np.testing.assert_allclose(
        np.asarray(found["w"])[places], expected[places], rtol=0, atol=60 * 9 * U
    )
    # A window of two has passed it by; all others keep it.
    assert np.isfinite(found["w"][2]) == (weights[1] == 0)


@every_method
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_weights_that_get_narrower_go_on_in_a_loop_as_they_were_kept(case, name):
    average = Case(case.method).make()
    narrow = [
        {**model, "w": jnp.asarray(model["w"]).astype(name)} for model in MODELS[2:]
    ]  # small integers, which all of them hold
    state = loop(Case(case.method).make(), MODELS[:2])
    dtypes = [x.dtype for x in jax.tree.leaves(state)]
    for model in narrow:
        state = swa_jax.update_average(state, model, average)
    assert [x.dtype for x in jax.tree.leaves(state)] == dtypes
    assert bits(state) == bits(loop(Case(case.method).make(), MODELS))
    found = swa_jax.averaged_params(state, narrow[-1], case.method.state)
    assert found["w"].dtype == name
