"""A pass over a model that is repeated, as after every epoch, is compiled once."""

import gc
import weakref

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swa_jax.frameworks import equinox, flax, haiku, keras
from swa_jax.frameworks._kept import kept, weak
from swa_jax.frameworks.keras import keras as keras_lib

BATCHES = [
    np.random.default_rng(i).normal(i, 1 + i, (8, 3)).astype(np.float32)
    for i in range(3)
]
EVERY = np.concatenate(BATCHES).astype(np.float64)


class Traces:
    """Counts the passes that Python sees: those that are traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, x):
        self.count += 1
        return x


def nnx_passes(traces):
    class Net(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(traces(x) * self.scale)

    model = Net()

    def run(scale, batches):
        model.scale[...] = jnp.float32(scale)
        flax.recompute_batch_stats(model, batches)
        return model.norm.mean[...]

    return run


def equinox_passes(traces):
    class Net(eqx.Module):
        scale: jax.Array
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(traces(x) * self.scale, state)

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "b", mode="ema")
    assert norm.ema_state_index is not None
    index, model = norm.ema_state_index, Net(jnp.ones(3), norm)

    def forward(model, state, x):
        return jax.vmap(model, (0, None), (0, None), axis_name="b")(x, state)

    def run(scale, batches):
        new = eqx.tree_at(lambda m: m.scale, model, jnp.full(3, scale))
        new_state = equinox.recompute_batch_stats(new, state, batches, forward)
        return new_state.get(index)[0]

    return run


def haiku_passes(traces):
    def network(x):
        scale = hk.get_parameter("scale", [], init=jnp.ones)
        return hk.BatchNorm(True, True, 0.99)(traces(x) * scale, True)

    model = hk.transform_with_state(network)
    params, state = model.init(jax.random.key(0), BATCHES[0])

    def apply(params, state, x):
        return model.apply(params, state, None, x)

    def run(scale, batches):
        new = params | {"~": {"scale": jnp.float32(scale)}}
        new_state = haiku.recompute_batch_stats(apply, new, state, batches)
        return new_state["batch_norm/~/mean_ema"]["average"][0]

    return run


def keras_passes(traces):
    class Scale(keras_lib.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return traces(x) * self.scale

    norm = keras_lib.layers.BatchNormalization()
    layer = Scale()
    model = keras_lib.Sequential([keras_lib.Input((3,)), layer, norm])

    def run(scale, batches):
        layer.scale.assign(scale)
        keras.recompute_batch_stats(model, batches)
        return norm.moving_mean.value

    return run


@pytest.mark.parametrize(
    "make", [nnx_passes, equinox_passes, haiku_passes, keras_passes]
)
def test_a_second_pass_is_not_traced(make):
    traces = Traces()
    run = make(traces)
    np.testing.assert_allclose(run(1.0, BATCHES), EVERY.mean(0), rtol=1e-5)
    first = traces.count
    assert first
    np.testing.assert_allclose(run(3.0, BATCHES), 3 * EVERY.mean(0), rtol=1e-5)
    assert traces.count == first
    # A pass over data of another shape is another program.
    run(1.0, [batch[:5] for batch in BATCHES])
    assert traces.count > first


def test_another_way_to_run_the_model_is_another_pass():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x, sign=1.0):
            return self.norm(sign * x)

    model = Net()
    batches = [{"x": x, "y": 2 * x} for x in BATCHES]
    for options, factor in (
        ({"inputs": "x"}, 1),
        ({"inputs": "y"}, 2),
        ({"inputs": lambda batch: (batch["x"], -3.0)}, -3),
        ({"forward": lambda model, batch: model(5 * batch["x"])}, 5),
        ({"forward": lambda model, batch: model(batch["x"], -1.0)}, -1),
    ):
        flax.recompute_batch_stats(model, batches, **options)
        got = model.norm.mean[...]
        np.testing.assert_allclose(got, factor * EVERY.mean(0), rtol=1e-5)
    model.norm.axis = 0  # of the model itself, not of its arrays
    model.norm.mean[...] = model.norm.var[...] = jnp.zeros(3)
    with pytest.raises(Exception):  # noqa: B017 - whatever Flax says of it
        flax.recompute_batch_stats(model, batches, inputs="x")


def test_a_frozen_layer_of_keras_without_weights_is_noticed():
    norm = keras_lib.layers.BatchNormalization(center=False, scale=False)
    model = keras_lib.Sequential([keras_lib.Input((3,)), norm])
    keras.recompute_batch_stats(model, BATCHES)
    norm.trainable = False
    with pytest.raises(ValueError, match="returned batch_stats unchanged"):
        keras.recompute_batch_stats(model, [2 * x for x in BATCHES])
    np.testing.assert_allclose(norm.moving_mean.value, EVERY.mean(0), rtol=1e-5)


def test_nothing_keeps_a_model_alive():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    def run(model):  # by a function that holds the model
        flax.recompute_batch_stats(
            model, BATCHES, forward=lambda copy, x: (model, copy(x))
        )

    model = Net()
    run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_keys_that_cannot_be_compared_are_no_keys():
    def owner():
        pass

    def make():
        return lambda params, stats, batch: stats

    arrays = np.zeros(3)
    assert kept(owner, [arrays], make) is not kept(owner, [arrays.copy()], make)
    assert kept([], 0, make) is not kept([], 0, make)
    assert kept(owner, weak(0), make) is kept(owner, weak(0), make)
    assert kept(owner, weak(make), make) is kept(owner, weak(make), make)
    assert kept(owner, weak(make), make) is not kept(owner, weak(owner), make)
