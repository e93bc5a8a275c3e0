"""Every average goes on from a checkpoint as if nothing had happened.

Through Flax's msgpack and Orbax, in mid-run, between sampled steps and behind them, and
onto another number of devices.
"""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax

from .transformations import (
    bits,
    counters,
    every_method,
    gradient,
    make_step,
    structure,
    trees,
    types,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)


def model(seed: int = 0) -> dict:
    """Parameters, some of which divide by eight, and what is no weight."""
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(2, 8)), jnp.bfloat16),
        "b": jnp.asarray(rng.normal(size=3), jnp.float32),
        "none": None,
    }


def run(step, params, opt_state, steps):
    """The state after some steps, and the weights after each."""
    history = []
    for t in steps:
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append(jax.device_get(params))
    return params, opt_state, history


def msgpack(saved, target, path):
    del path
    data = flax.serialization.to_bytes(saved)
    return flax.serialization.from_bytes(target, data)


def orbax_restore(saved, target, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", target)


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


#: Before the first model, with one of three in it, behind a skipped step, at the end.
STOPS = (2, 3, 6, 8)


@every_method
@pytest.mark.parametrize("store", [msgpack, orbax_restore], ids=["msgpack", "orbax"])
def test_resumed_training_ends_with_the_same_bits(case, store, tmp_path):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), case.make())
    step = jax.jit(make_step(tx))
    start = (model(), tx.init(model()))
    straight = run(step, *start, range(9))[:2]
    for stop in STOPS if store is msgpack else STOPS[2:3]:
        saved = run(step, *start, range(stop))[:2]
        # Another run's: nothing may be left of it.
        fresh = model(seed=1)
        again = optax.chain(optax.sgd(0.1, momentum=0.9), case.make())
        restored = store(saved, (fresh, again.init(fresh)), tmp_path)
        assert bits(restored) == bits(saved)
        assert structure(restored) == structure(saved)
        assert type(case.state(restored)) is case.method.state
        params, opt_state = restored
        resumed = run(step, params, opt_state, range(stop, 9))[:2]
        assert bits(resumed) == bits(straight)
        assert types(resumed) == types(straight)
    assert tuple(map(int, counters(case.state(straight[1])))) == (9, 4)


@every_method
def test_an_average_from_a_loop_resumes(case, tmp_path):
    average = case.make()
    models = [model(seed) for seed in range(6)]

    def follow(state, models):
        for each in models:
            state = swa_jax.update_average(state, each, average)
        return state

    straight = follow(swa_jax.init_average(models[0], average), models)
    saved = follow(swa_jax.init_average(models[0], average), models[:4])
    saved = jax.device_get(saved)  # the next call would donate it
    target = swa_jax.init_average(models[5], average)
    for store in (msgpack, orbax_restore):
        restored = store(saved, target, tmp_path)
        assert bits(follow(restored, models[4:])) == bits(straight)


# Onto other devices.


def on(devices: int, tree):
    """What divides by the number of devices, split over that many."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",), axis_types=(AxisType.Auto,))
    specs = {"w": P("x"), "h": P(None, "x"), "b": P(), "none": None}
    shardings = {
        name: None if spec is None else NamedSharding(mesh, spec)
        for name, spec in specs.items()
    }
    return jax.device_put(tree, shardings)


def parts(tree) -> set[int]:
    """In how many parts devices hold the leaves of each tree that can be split."""
    leaves = [leaf for name in ("w", "h") for leaf in jax.tree.leaves(tree[name])]
    return {x.size // x.addressable_shards[0].data.size for x in leaves}


@every_method
def test_restart_on_fewer_devices(case, tmp_path):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), case.make())
    step = jax.jit(make_step(tx, gradient))
    params = on(8, model())
    *saved, before = run(step, params, jax.jit(tx.init)(params), range(5))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        for devices in (4, 2, 1):
            params = on(devices, model(seed=1))
            target = abstract([params, jax.jit(tx.init)(params)])
            restored = checkpointer.restore(tmp_path / "state", target)
            assert bits(restored) == bits(saved)
            for tree in trees(case.state(restored[1])):
                assert parts(tree) == {devices}
            if devices == 2:
                going_on = restored
    params, opt_state = going_on
    params, opt_state, after = run(step, params, opt_state, range(5, 9))
    for tree in trees(case.state(opt_state)):
        assert parts(tree) == {2}
    case.assert_run(params, opt_state, before + after)
