"""What earlier versions wrote is restored, or it is said which version wrote it.

``tests/golden/checkpoints`` has the states of every average as each version wrote them,
and the averages that it read from them; ``make_checkpoints.py`` beside it records them.
"""

import json
import pathlib
import re
import shutil

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint
import pytest

import swa_jax

from ..golden import make_checkpoints as golden
from .reference import Definition, Ledger, Schedule
from .transformations import U, bits, structure

VERSIONS = sorted(path.name for path in golden.FOLDER.iterdir())

#: By the name of the state: what it is of, and when models enter.
DEFINITIONS = {
    "swa": Definition(),
    "swa_late": Definition(),
    "swa_bfloat16": Definition(),
    "compensated": Definition(compensated=True),
    "ema": Definition(lambda n: 0.3 / (1 - 0.7**n)),
    "ema_warmup": Definition(lambda n: max(0.1, n**-0.75)),
    "power_ema": Definition(lambda n: 1 - (1 - 1 / n) ** 3.5),
    "lawa": Definition(window=3),
    "swag": Definition(rank=3),
    "swag_diagonal": Definition(rank=0),
    "none_yet": Definition(),
    "recipe": Definition(),
}
#: The recipe of 6 epochs begins at the third.
SCHEDULES = {
    "swa_late": Schedule(start_step=2, period=2),
    "none_yet": Schedule(start_step=100),
    "recipe": Schedule(start_step=3),
}


def msgpack(folder, target):
    data = (folder / "states.msgpack").read_bytes()
    return flax.serialization.from_bytes(target, data)


def orbax_restore(folder, target):
    path = folder / "orbax"
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        if target is None:  # all as NumPy's: JAX 0.8 has other names for devices
            saved = checkpointer.metadata(path).item_metadata
            target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved.tree)
        return checkpointer.restore(path, target)


@pytest.fixture(params=VERSIONS)
def folder(request, tmp_path):
    """A copy, which is all that a reader might write to."""
    return shutil.copytree(golden.FOLDER / request.param, tmp_path / request.param)


every_store = pytest.mark.parametrize(
    "store", [msgpack, orbax_restore], ids=["msgpack", "orbax"]
)


def assert_recorded(folder, when, states, number):
    recorded = json.loads((folder / "values.json").read_text())[when]
    read = golden.read(states, golden.models()[number])
    assert read.keys() == recorded.keys()
    for name, values in recorded.items():
        # Another compiler may round the last place otherwise; bfloat16's is 2**16 as
        # large, so that it hides that, unless it falls on a tie.
        np.testing.assert_allclose(read[name], values, rtol=8 * U, err_msg=name)


@every_store
def test_states_of_every_version_are_restored(folder, store):
    target = golden.fresh()
    states = store(folder, target)
    assert structure(states) == structure(target)
    assert_recorded(folder, "then", states, golden.NUM_MODELS - 1)


@pytest.mark.slow
@every_store
def test_states_of_every_version_go_on(folder, store):
    last = golden.NUM_MODELS
    later = golden.after(store(folder, golden.fresh()), range(last, last + 1))
    assert_recorded(folder, "later", later, last)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_recorded_is_what_the_averages_are(version):
    """In float64, from their definitions."""
    values = json.loads((golden.FOLDER / version / "values.json").read_text())
    models = golden.models()
    arrays = [[np.asarray(x) for x in jax.tree.leaves(model)] for model in models]
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(models[0])[0]
    ]
    assert DEFINITIONS.keys() == golden.fresh().keys()
    for name, definition in DEFINITIONS.items():
        wide = None if name != "swa_bfloat16" else arrays[0][0].dtype
        ledger = Ledger(
            definition,
            SCHEDULES.get(name, Schedule()),
            [x.dtype for x in arrays[0]],
            wide,
        )
        for t, model in enumerate(arrays):
            ledger.see(model)
            when = {golden.NUM_MODELS - 1: "then", golden.NUM_MODELS: "later"}.get(t)
            if when is None or not ledger.averaged:
                continue
            for path, mean, param in zip(paths, ledger.means(), model, strict=True):
                found = np.array(values[when][f"{name}{path}"]).astype(param.dtype)
                mean.check(found, f"{name}{path}")
        assert ledger.averaged or name == "none_yet"


def test_this_version_is_recorded():
    # `python tests/golden/make_checkpoints.py`, before it is released.
    assert swa_jax.__version__ in VERSIONS


STATES = {
    "swa": "an SWAState, an EMAState or a PowerEMAState",
    "power_ema": "an SWAState, an EMAState or a PowerEMAState",
    "compensated": "a CompensatedSWAState",
    "lawa": "a LAWAState",
    "swag": "a SWAGState",
    "recipe": "an SWAState, an EMAState or a PowerEMAState",
}


@every_store
@pytest.mark.parametrize("name", STATES)
def test_a_state_without_its_type_tells_which_versions_wrote_it(folder, store, name):
    if store is msgpack:
        data = (folder / "states.msgpack").read_bytes()
        raw = flax.serialization.msgpack_restore(data)
    else:
        raw = orbax_restore(folder, None)
    # No field has changed since the first.
    assert folder.name in VERSIONS
    message = r"has lost its structure\. These are the fields of " + re.escape(
        f"{STATES[name]}, as swa_jax 0.1.0 and later write. Fix"
    )
    with pytest.raises(ValueError, match=message):
        swa_jax.average_state(raw[name])
    with pytest.raises(ValueError, match=message):
        swa_jax.averaged_params(({}, {"avg": raw[name]}), golden.models()[0])


def test_a_state_of_a_later_version_is_not_taken_for_one_of_ours():
    state = {"num_updates": 3, "num_averaged": 2, "avg_params": {}, "scale": 1.0}
    message = (
        r"Fields named avg_params, num_averaged, num_updates, scale together are of no "
        rf"state up to swa_jax {re.escape(swa_jax.__version__)}, which this is: a "
        "later version wrote them; install it"
    )
    with pytest.raises(ValueError, match=message):
        swa_jax.average_state((None, [state]))


def test_every_state_has_a_line_of_its_own():
    """The table says of each type what it is, so none of them lacks a version."""
    for name, state in golden.fresh().items():
        if name == "recipe":
            state = state.average
        raw = flax.serialization.to_state_dict(state)
        with pytest.raises(ValueError, match=type(state).__name__):
            swa_jax.average_state(raw)


def test_reading_leaves_the_files_alone(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = msgpack(folder, golden.fresh())
    assert bits(orbax_restore(folder, golden.fresh())) == bits(first)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_the_files_are_small_and_name_no_machine():
    files = [path for path in golden.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000 * len(VERSIONS)
    for path in files:
        assert str(pathlib.Path.cwd()).encode() not in path.read_bytes(), path
