"""``swa()`` in Flax: linen's ``TrainState``, ``nnx.Optimizer``, msgpack checkpoints.

Oracles are float64 means of the parameters that the training loop stored. U is
float32's half ulp; the bound of a running mean is derived in test_averaging.py.
"""

import functools

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

import swa_jax

from .transformations import structure

U = 2.0**-24
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def bits(tree) -> list[bytes]:
    """The exact content of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_mean(average, models) -> None:
    """Compares with the float64 mean."""

    def check(got, *models):
        stacked = np.stack(models).astype(np.float64)
        np.testing.assert_allclose(
            np.asarray(got, np.float64),
            stacked.mean(0),
            rtol=0,
            atol=U * np.abs(stacked).max() * (len(stacked) / 2 + 5),
        )

    jax.tree.map(check, average, *models)


# Linen.


class MLP(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Dense(3)(x)))


mlp = MLP()
#: Adam, and the average of updates 2, 4, 6, ...
tx = optax.chain(optax.adam(0.1), swa_jax.swa(start_step=2, period=2))


@functools.cache
def make_train_state(seed: int = 0) -> TrainState:
    """A fresh one. Nothing here donates it, so all tests share its compiled step."""
    params = mlp.init(jax.random.key(seed), X)["params"]
    return TrainState.create(apply_fn=mlp.apply, params=params, tx=tx)


@jax.jit
def linen_step(state: TrainState) -> TrainState:
    """One step of training."""

    def loss(params):
        return jnp.mean(state.apply_fn({"params": params}, X) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def test_train_state():
    state, history = make_train_state(), []
    for _ in range(6):
        state = linen_step(state)
        history.append(jax.device_get(state.params))
    average = swa_jax.swa_params(state.opt_state, state.params)
    assert_mean(average, history[1::2])
    # The whole TrainState will do as well, and params may be frozen or not.
    assert bits(swa_jax.swa_params(state, state.params)) == bits(average)
    assert bits(swa_jax.swa_state(state)) == bits(swa_jax.swa_state(state.opt_state))
    chex.assert_shape(state.apply_fn({"params": average}, X), (8, 2))
    evaluated = state.replace(params=average)
    assert structure(evaluated) == structure(state)


def test_frozen_params():
    # Containers of params and average may differ; their paths may not.
    state = linen_step(linen_step(make_train_state()))
    average = swa_jax.swa_params(state.opt_state, state.params)
    frozen = swa_jax.swa_params(state.opt_state, freeze(state.params))
    assert bits(frozen) == bits(average)
    assert structure(frozen) == structure(freeze(state.params))


@pytest.mark.parametrize("what", ["opt_state", "train_state"])
@pytest.mark.parametrize("steps", [1, 3])
def test_msgpack_round_trip_continues_bit_for_bit(what, steps):
    state = make_train_state()
    for _ in range(steps):
        state = linen_step(state)
    fresh = make_train_state(seed=1)  # another run, as after a restart
    if what == "opt_state":
        data = flax.serialization.to_bytes(state.opt_state)
        opt_state = flax.serialization.from_bytes(fresh.opt_state, data)
        restored = fresh.replace(
            step=state.step, params=state.params, opt_state=opt_state
        )
    else:
        data = flax.serialization.to_bytes(state)
        restored = flax.serialization.from_bytes(fresh, data)
    assert isinstance(swa_jax.swa_state(restored), swa_jax.SWAState)
    for _ in range(4):
        state, restored = linen_step(state), linen_step(restored)
    assert bits(restored) == bits(state)
    read = [swa_jax.swa_params(each, each.params) for each in (restored, state)]
    assert bits(read[0]) == bits(read[1])


def test_train_state_that_swa_joins():
    state = make_train_state()
    state = swa_jax.with_num_updates(state.replace(step=3), 3)
    assert (state.step, int(swa_jax.swa_state(state).num_updates)) == (3, 3)
    assert int(swa_jax.swa_state(linen_step(state)).num_averaged) == 1  # update 4


def test_checkpoints_restored_without_their_structure(tmp_path):
    state = make_train_state()
    restored = {
        r"\['1'\]": flax.serialization.msgpack_restore(
            flax.serialization.to_bytes(state.opt_state)
        )
    }
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state.opt_state)
        checkpointer.wait_until_finished()
        restored[r"\[1\]"] = checkpointer.restore(tmp_path / "state")
    for path, opt_state in restored.items():
        with pytest.raises(
            ValueError, match=rf"at opt_state{path}.* lost its structure.*from_bytes"
        ):
            swa_jax.swa_params(opt_state, state.params)


def test_msgpack_of_an_average_driven_from_a_loop():
    models = [
        {"w": jnp.full(3, x), "h": jnp.full(2, x, jnp.bfloat16)} for x in (1.0, 4.0)
    ]
    state = swa_jax.update_average(swa_jax.init_average(models[0]), models[0])
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(swa_jax.init_average(models[1]), data)
    # NumPy arrays by now; the types are those of before.
    assert bits(restored) == bits(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    restored = swa_jax.update_average(restored, models[1])
    expected = {"w": np.full(3, 2.5, np.float32), "h": np.full(2, 2.5, np.float32)}
    chex.assert_trees_all_equal(restored.avg_params, expected)
    assert int(restored.num_averaged) == 2


# NNX.


class Net(nnx.Module):
    """A layer, BatchNorm, whose statistics are no parameters, and a layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


@nnx.jit
def nnx_step(model, optimizer):
    """One step of training."""

    def loss(model):
        return jnp.mean((model(X) - 1.0) ** 2)

    optimizer.update(model, nnx.grad(loss)(model))


def train_nnx(steps: int):
    """A model, its optimizer, and the parameters after every step."""
    model, history = Net(nnx.Rngs(0)), []
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(steps):
        nnx_step(model, optimizer)
        history.append(jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    return model, optimizer, history


def test_nnx_optimizer():
    model, optimizer, history = train_nnx(6)
    state = swa_jax.swa_state(optimizer)
    assert (int(state.num_updates), int(state.num_averaged)) == (6, 3)
    for counter in state[:2]:
        assert isinstance(counter, jax.Array)
    assert swa_jax.swa_state(optimizer.opt_state).num_averaged == 3

    params = nnx.state(model, nnx.Param)
    trained = bits(params)
    average = swa_jax.swa_params(optimizer, params)
    assert_mean(nnx.to_pure_dict(average), history[1::2])
    assert bits(swa_jax.swa_params(optimizer.opt_state, params)) == bits(average)
    assert bits(nnx.state(model, nnx.Param)) == trained  # reading changes nothing

    nnx.update(model, average)
    assert bits(nnx.state(model, nnx.Param)) == bits(average)
    assert model(X).shape == (8, 2)
    model.eval()
    chex.assert_tree_all_finite(model(X))


def test_nnx_before_the_first_model():
    model, optimizer, _ = train_nnx(1)
    params = nnx.state(model, nnx.Param)
    average = swa_jax.swa_params(optimizer, params, allow_empty=True)
    assert bits(average) == bits(params)


@pytest.mark.parametrize("what", ["model", "everything"])
def test_nnx_something_else_in_place_of_the_parameters(what):
    model, optimizer, _ = train_nnx(2)
    params = model if what == "model" else nnx.state(model)
    with pytest.raises(
        ValueError, match=r"holds no average.*nnx.state\(model, nnx.Par"
    ):
        swa_jax.swa_params(optimizer, params)


def test_nnx_state_of_the_optimizer():
    model, optimizer, _ = train_nnx(2)
    params = nnx.state(model, nnx.Param)
    with pytest.raises(
        ValueError,
        match=r"a State.* at opt_state\['opt_state'\]\[1\].*pass the nnx.Opt",
    ):
        swa_jax.swa_params(nnx.state(optimizer), params)
    with pytest.raises(ValueError, match="swapped"):
        swa_jax.swa_params(params, optimizer)


@pytest.mark.parametrize("part", ["optimizer", "opt_state"])
def test_nnx_swa_joins_a_run_under_way(part):
    """Two updates without, as far as swa() knows: number 4 is then averaged."""
    model, optimizer, _ = train_nnx(0)
    before = bits(optimizer)
    if part == "optimizer":
        changed = swa_jax.with_num_updates(optimizer, optimizer.step + 2)
        assert bits(optimizer) == before  # it is pure
        optimizer = changed
    else:
        optimizer.opt_state = swa_jax.with_num_updates(optimizer.opt_state, 2)
    assert isinstance(optimizer, nnx.Optimizer)
    history = []
    for _ in range(2):
        nnx_step(model, optimizer)
        history.append(jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    state = swa_jax.swa_state(optimizer)
    assert (int(state.num_updates), int(state.num_averaged)) == (4, 1)
    average = swa_jax.swa_params(optimizer, nnx.state(model, nnx.Param))
    assert_mean(nnx.to_pure_dict(average), history[1:])


def test_nnx_training_goes_on_after_reading():
    # The average shares no buffer with the optimizer, which stays usable.
    model, optimizer, _ = train_nnx(2)
    average = swa_jax.swa_params(optimizer, nnx.state(model, nnx.Param))
    before = bits(average)
    for _ in range(2):
        nnx_step(model, optimizer)
    assert bits(average) == before
    assert int(swa_jax.swa_state(optimizer).num_averaged) == 2


def test_nnx_functional():
    # The functional style: the state of everything goes through jax.jit.
    model, optimizer, _ = train_nnx(2)
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def read(state):
        model, optimizer = nnx.merge(graphdef, state)
        return swa_jax.swa_params(optimizer, nnx.state(model, nnx.Param))

    expected = swa_jax.swa_params(optimizer, nnx.state(model, nnx.Param))
    assert bits(read(state)) == bits(expected)


def test_nnx_average_driven_from_a_loop():
    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    average = swa_jax.init_average(params)
    for value in (1.0, 2.0, 6.0):
        nnx.update(model, jax.tree.map(lambda x, v=value: jnp.full_like(x, v), params))
        average = swa_jax.update_average(average, nnx.state(model, nnx.Param))
    nnx.update(model, swa_jax.swa_params(average, params))
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, 3.0))
