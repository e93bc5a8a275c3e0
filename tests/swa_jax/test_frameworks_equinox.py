"""Models of Equinox, whole, and the pass over them, against NumPy's float64."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax
from swa_jax.frameworks import equinox as frameworks

from .populations import BATCHES, assert_statistics, f64, population, two_layers
from .transformations import every_method, gradient

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

EPS = 1e-5  # Equinox's default
MODES = ("ema", "batch")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Equinox's own layers promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm_0: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear
    norm_1: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key, mode, momentum=0.99, dtype=None):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm_0 = make_norm(4, mode, momentum, dtype)
        self.dropout = eqx.nn.Dropout(0.0)
        self.second = eqx.nn.Linear(4, 2, key=keys[1])
        self.norm_1 = make_norm(2, mode, momentum, dtype)
        self.head = eqx.nn.Linear(2, 2, key=keys[2])

    def __call__(self, x, state):
        x, state = self.norm_0(self.first(x), state)
        x, state = self.norm_1(self.second(self.dropout(jnp.tanh(x))), state)
        return self.head(x), state


def make_norm(size, mode, momentum=0.99, dtype=None):
    return eqx.nn.BatchNorm(size, "batch", mode=mode, momentum=momentum, dtype=dtype)


def forward(model, state, x):
    return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)


step = eqx.filter_jit(forward)


@eqx.filter_jit
def inferred(model, state, x):
    return forward(eqx.nn.inference_mode(model), state, x)[0]


def make(kind, *arguments, **options):
    """A model with perturbed weights, and its state."""
    model, state = eqx.nn.make_with_state(kind)(*arguments, **options)
    params, static = eqx.partition(model, eqx.is_array)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [
        x + 0.3 * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), static), state


def read(norm, state):
    """Mean and variance as Equinox reads them in inference."""
    if norm.mode == "ema":
        return state.get(norm.ema_state_index)
    mean, var = state.get(norm.batch_state_index)
    counter = state.get(norm.batch_counter)
    scale = jnp.where(counter == 0, 1, 1 - norm.momentum**counter)
    return mean / scale, var / scale


def expected_of(model):
    first, norm, second = model.first, model.norm_0, model.second
    return two_layers(
        (first.weight.T, first.bias),
        (norm.weight, norm.bias),
        (second.weight.T, second.bias),
        EPS,
    )


def assert_net(model, state):
    wanted = expected_of(model)
    assert_statistics(read(model.norm_0, state), wanted[0])
    assert_statistics(read(model.norm_1, state), wanted[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "steps"), [("ema", 0), ("ema", 30), ("batch", 0), ("batch", 1)]
)
def test_statistics_of_both_modes(mode, steps):
    """At any counter: fresh, after one step, after some."""
    model, state = make(Net, jax.random.key(0), mode)
    for _ in range(steps):
        _, state = step(model, state, BATCHES[0])
    given = state
    recomputed = frameworks.recompute_batch_stats(model, state, BATCHES, forward)
    assert_net(model, recomputed)
    given.get(frameworks._indices(model.norm_0)[0])  # it is still valid
    # Inference normalises by them.
    norm = eqx.nn.inference_mode(model.norm_0)
    out, _ = norm(jnp.asarray(expected_of(model)[0][0], jnp.float32), recomputed)
    np.testing.assert_allclose(f64(out), f64(norm.bias), atol=1e-5)
    # Training goes on from them, one batch being one hundredth.
    before = read(model.norm_0, recomputed)
    _, after = step(model, recomputed, BATCHES[1])
    rows = f64(BATCHES[1]) @ f64(model.first.weight.T) + f64(model.first.bias)
    pairs = zip(before, population([rows]), strict=True)
    wanted = [0.99 * f64(old) + 0.01 * new for old, new in pairs]
    assert_statistics(read(model.norm_0, after), wanted)


@pytest.mark.parametrize("momentum", [0.5, 0.9999])
def test_momenta_of_the_debiased_mode(momentum):
    model, state = make(Net, jax.random.key(0), "batch", momentum)
    recomputed = frameworks.recompute_batch_stats(model, state, BATCHES, forward)
    assert_net(model, recomputed)


@pytest.mark.parametrize("eps", [2.0**-52, 2.0**-23, 2.0**-7])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.99, 0.99999, 1 - 1e-9])
def test_counter_without_bias(momentum, eps):
    counter, scale = frameworks._counter_without_bias(momentum, eps)
    assert 1 <= counter < 2**31 - 2**20
    left = 1.0 - np.float64(momentum) ** counter
    assert abs(scale - left) <= eps  # of float64, or of the statistics
    assert scale == 1 or momentum == 1 - 1e-9


def test_model_in_inference_mode():
    model, state = make(Net, jax.random.key(0), "ema")
    evaluated = eqx.nn.inference_mode(model)
    recomputed = frameworks.recompute_batch_stats(evaluated, state, BATCHES, forward)
    assert_net(model, recomputed)
    assert evaluated.norm_0.inference


@pytest.mark.parametrize("mode", MODES)
def test_keep_means_what_inference_reads(mode):
    model, state = make(Net, jax.random.key(0), mode)
    for _ in range(3):
        _, state = step(model, state, BATCHES[0])
    kept = frameworks.recompute_batch_stats(
        model, state, BATCHES, forward, keep=".norm_1"
    )
    before, after = (read(model.norm_1, each) for each in (state, kept))
    assert_statistics(after, map(f64, before))
    assert_statistics(read(model.norm_0, kept), expected_of(model)[0])


class Spectral(eqx.Module):
    spectral: eqx.nn.SpectralNorm
    norm: eqx.nn.BatchNorm

    def __init__(self, key, mode):
        keys = jax.random.split(key)
        linear = eqx.nn.Linear(3, 4, key=keys[0])
        self.spectral = eqx.nn.SpectralNorm(linear, "weight", key=keys[1])
        self.norm = make_norm(4, mode)

    def __call__(self, x, state):
        x, state = self.spectral(x, state)
        return self.norm(x, state)


@pytest.mark.parametrize(("mode", "iterations"), [("ema", 100), ("batch", 0)])
def test_spectral_norm_in_the_same_state(mode, iterations, monkeypatch):
    """Inference has the vectors of the pass, be they at their limit or far from it."""
    monkeypatch.setattr(frameworks, "_POWER_ITERATIONS", iterations)
    model, state = make(Spectral, jax.random.key(0), mode)
    recomputed = frameworks.recompute_batch_stats(model, state, BATCHES, forward)
    linear = model.spectral.layer
    weight = f64(linear.weight)
    u, v = map(f64, recomputed.get(model.spectral.uv_index))
    sigma = u @ weight @ v
    limit = np.linalg.norm(weight, 2)
    assert (abs(sigma / limit - 1) < 1e-5) == (iterations > 0)
    rows = [f64(x) @ weight.T / sigma + f64(linear.bias) for x in BATCHES]
    assert_statistics(read(model.norm, recomputed), population(rows))
    # So inference has zero mean and unit variance.
    out = f64(inferred(model, recomputed, jnp.concatenate(BATCHES)))
    np.testing.assert_allclose(out.mean(0), f64(model.norm.bias), atol=1e-5)
    np.testing.assert_allclose(out.std(0), np.abs(f64(model.norm.weight)), rtol=1e-4)


class Scanned(eqx.Module):
    """A stack of norms under one lax.scan, their state with them."""

    blocks: eqx.nn.Linear
    norms: eqx.nn.BatchNorm

    def __init__(self, key, mode):
        keys = jax.random.split(key, 3)
        self.blocks = eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 3, key=k))(keys)
        self.norms = eqx.filter_vmap(lambda _: make_norm(3, mode))(keys)

    def __call__(self, x, state):
        params, static = eqx.partition((self.blocks, self.norms), eqx.is_array)

        def block(x, scanned):
            params, state = scanned
            linear, norm = eqx.combine(params, static)
            x, state = norm(linear(x), state)
            return jnp.tanh(x), state

        x, sub = jax.lax.scan(block, x, (params, state.substate(self.norms)))
        return x, state.update(sub)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_scan_over_layers(mode):
    model, state = make(Scanned, jax.random.key(0), mode)
    recomputed = frameworks.recompute_batch_stats(model, state, BATCHES, forward)
    rows = [f64(x) for x in BATCHES]
    means, variances = read(model.norms, recomputed)
    for i, (mean, var) in enumerate(zip(means, variances, strict=True)):
        weight, bias = model.blocks.weight[i], model.blocks.bias[i]
        rows = [x @ f64(weight).T + f64(bias) for x in rows]
        assert_statistics((mean, var), population(rows))
        scale, shift = f64(model.norms.weight[i]), f64(model.norms.bias[i])
        rows = [
            np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + EPS) * scale + shift)
            for x in rows
        ]


class Counting(eqx.Module):
    """State of the user's own, an average and a counter, beside the norm."""

    norm: eqx.nn.BatchNorm
    average: eqx.nn.StateIndex
    counter: eqx.nn.StateIndex

    def __init__(self, mode):
        self.norm = make_norm(3, mode)
        self.average = eqx.nn.StateIndex(jnp.zeros(()))
        self.counter = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))

    def __call__(self, x, state):
        y = jax.lax.pmean(x.sum(), "batch")
        state = state.set(self.average, 0.9 * state.get(self.average) + 0.1 * y)
        state = state.set(self.counter, state.get(self.counter) + 1)
        return self.norm(x, state)


@pytest.mark.parametrize("mode", MODES)
def test_other_state(mode):
    model, state = make(Counting, mode)
    recomputed = frameworks.recompute_batch_stats(
        model, state, BATCHES, forward, mode="sample_weighted"
    )
    mean = np.concatenate(BATCHES).astype(np.float64).sum(1).mean()
    np.testing.assert_allclose(recomputed.get(model.average), mean, rtol=1e-5)
    assert recomputed.get(model.counter) == len(BATCHES)
    kept = frameworks.recompute_batch_stats(
        model, state, BATCHES, forward, keep=[".average", ".norm/var"]
    )
    assert kept.get(model.average) == 0
    assert_statistics(read(model.norm, kept)[:1], population(BATCHES)[:1])


def test_averaged_weights_end_to_end():
    """From the average of a training loop to a network that infers with it."""
    model, state = make(Net, jax.random.key(0), "batch")
    average = swa_jax.init_average(eqx.filter(model, eqx.is_array))
    models = [
        jax.tree.map(lambda x, c=c: c * x if eqx.is_array(x) else x, model)
        for c in (1.0, 1.5)
    ]
    for each in models:
        average = swa_jax.update_average(average, eqx.filter(each, eqx.is_array))
    averaged = eqx.combine(average.avg_params, model)
    recomputed = frameworks.recompute_batch_stats(averaged, state, BATCHES, forward)
    assert_net(averaged, recomputed)
    assert np.isfinite(inferred(averaged, recomputed, BATCHES[0])).all()


# Modules passed whole, with what is no weight in them.


class Whole(eqx.Module):
    """Leaves of every sort; ``is_inexact_array`` leaves three of them."""

    linear: eqx.nn.Linear
    scale: jax.Array
    dropout: eqx.nn.Dropout  # its p is a Python float
    activation: Callable = jnp.tanh
    name: str = "whole"
    depth: int = 2
    flag: bool = True
    dtype: Any = jnp.float32  # a class, with a dtype of its own
    nothing: Any = None
    steps: Any = eqx.field(default_factory=lambda: jnp.arange(3))
    table: Any = eqx.field(default_factory=lambda: np.array([2**40, 1]))
    key: Any = eqx.field(default_factory=lambda: jax.random.key(0))


def whole() -> Whole:
    linear = eqx.nn.Linear(3, 2, key=jax.random.key(1))
    return Whole(linear, jnp.array([1.0, -2.0], jnp.bfloat16), eqx.nn.Dropout(0.1))


def weights(model):
    return eqx.filter(model, eqx.is_inexact_array)


def rest(model):
    return eqx.filter(model, eqx.is_inexact_array, inverse=True)


@every_method
def test_module_passed_whole(case):
    average = case.make()
    tx = optax.chain(optax.adamw(0.1), average)

    @eqx.filter_jit
    def step(model, opt_state, t):
        updates, opt_state = tx.update(gradient(weights(model), t), opt_state, model)
        return eqx.apply_updates(model, updates), opt_state

    model, history = whole(), []
    opt_state = tx.init(weights(model))
    looped = swa_jax.init_average(weights(model), average)
    for t in range(8):
        model, opt_state = step(model, opt_state, jnp.float32(t))
        looped = swa_jax.update_average(looped, model, average)
        history.append(jax.device_get(weights(model)))
    assert len(jax.tree.leaves(history[0])) == 3
    for state in (opt_state, looped):
        for read in (case.read, eqx.filter_jit(case.read)):
            averaged = read(state, model)
            case.assert_average(weights(averaged), history)
            assert eqx.tree_equal(rest(averaged), rest(model))
        case.assert_average(case.read(state, weights(model)), history)
        pairs = zip(
            jax.tree.leaves(weights(averaged)),
            jax.tree.leaves(history[-1]),
            strict=True,
        )
        apart = np.sqrt(sum(((f64(x) - f64(y)) ** 2).sum() for x, y in pairs))
        found = swa_jax.average_distance(state, model, case.method.state)
        np.testing.assert_allclose(found, apart, rtol=1e-5)


def test_module_passed_whole_before_its_start():
    model = whole()
    state = swa_jax.init_average(weights(model))
    assert eqx.tree_equal(swa_jax.swa_params(state, model, allow_empty=True), model)


def test_sample_of_a_module_passed_whole():
    model, average = whole(), swa_jax.swag(rank=2)
    state = swa_jax.init_average(weights(model), average)
    for _ in range(3):
        state = swa_jax.update_average(state, model, average)
    sample = swa_jax.swag_sample(jax.random.key(0), state, model)
    assert eqx.tree_equal(sample, model)  # of models that are all alike


def test_module_passed_whole_with_its_statistics():
    model, stats = whole(), {"mean": jnp.zeros(2)}
    tx = swa_jax.with_batch_stats(swa_jax.swa(), stats)
    state, grads = tx.init(weights(model)), jax.tree.map(jnp.ones_like, weights(model))
    for t in (1.0, 2.0):
        stats = {"mean": jnp.full(2, t)}
        _, state = tx.update(grads, state, model, batch_stats=stats)
    both: dict[str, Any] = {"params": model, "batch_stats": stats}
    averaged = swa_jax.swa_params(state, both)
    np.testing.assert_array_equal(averaged["batch_stats"]["mean"], [1.5, 1.5])
    got, given = averaged["params"], model
    np.testing.assert_array_equal(got.linear.weight, f64(given.linear.weight + 1))
    assert eqx.tree_equal(rest(got), rest(given))


def test_integer_arrays_of_the_average_follow():
    """Where the average was initialised with all arrays, it has them all."""
    model = whole()
    state = swa_jax.init_average(eqx.filter(model, eqx.is_array))
    for steps in (1, 2):
        model = eqx.tree_at(lambda m: m.steps, model, jnp.full(3, steps))
        state = swa_jax.update_average(state, model)
    older = eqx.tree_at(lambda m: m.steps, model, jnp.zeros(3, int))
    np.testing.assert_array_equal(swa_jax.swa_params(state, older).steps, [2, 2, 2])


def test_weights_that_the_average_lacks_are_refused():
    model = whole()
    part = eqx.tree_at(lambda m: m.scale, weights(model), None)
    tx = swa_jax.swa()
    state, grads = tx.init(part), jax.tree.map(jnp.ones_like, part)
    only = r"only in params: \.scale; only in the state's average: nothing\. Fix: "
    with pytest.raises(ValueError, match=rf"^swa: params must have .*{only}"):
        tx.update(grads, state, model)
    with pytest.raises(ValueError, match=rf"^update_average: params must .*{only}"):
        swa_jax.update_average(state, model)
    with pytest.raises(ValueError, match=r"params\.scale of shape .* holds no average"):
        swa_jax.swa_params(state, model)
    for weight in (np.ones(2), np.float64(1), jnp.ones(2, jnp.complex64)):
        more = eqx.tree_at(lambda m: m.name, model, weight)
        state = swa_jax.init_average(weights(model))
        with pytest.raises(ValueError, match=r"only in params: \.name; only in the"):
            swa_jax.update_average(state, more)


def test_misuse():
    model, state = make(Net, jax.random.key(0), "batch")
    with pytest.raises(TypeError, match=r"equinox\.nn\.State, got dict; pass the sec"):
        frameworks.recompute_batch_stats(
            model,
            {},  # type: ignore[arg-type]
            BATCHES,
            forward,
        )
    with pytest.raises(TypeError, match=r"forward must be a function.*got NoneType"):
        frameworks.recompute_batch_stats(
            model,
            state,
            BATCHES,
            None,  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"forward must return \(output, state\).*got"):
        frameworks.recompute_batch_stats(
            model, state, BATCHES, lambda *given: forward(*given)[0]
        )
    linear, none = eqx.nn.make_with_state(eqx.nn.Linear)(3, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"of type Linear, has no BatchNorm"):
        frameworks.recompute_batch_stats(linear, none, BATCHES, forward)
    bad = [BATCHES[0], BATCHES[1] * np.nan]
    with pytest.raises(swa_jax.NonFiniteError, match=r"norm_0.*batch 2"):
        frameworks.recompute_batch_stats(model, state, bad, forward)
    state.get(model.norm_0.batch_counter)
