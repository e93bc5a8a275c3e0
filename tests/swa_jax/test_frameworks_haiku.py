"""The pass over models of Haiku, against NumPy's float64."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swa_jax
from swa_jax.frameworks import haiku as frameworks

from .populations import BATCHES, assert_statistics, f64, population, two_layers
from .transformations import structure

EPS = 1e-5  # Haiku's default
DEVICES = 2


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Haiku's own layers promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def network(decay, axis=None):
    """Linear, norm, tanh, linear, norm and a head, and its apply for the pass."""

    def forward(x, is_training):
        def norm(name):
            return hk.BatchNorm(True, True, decay, cross_replica_axis=axis, name=name)

        x = norm("norm_0")(hk.Linear(4, name="first")(x), is_training)
        x = hk.Linear(2, name="second")(jnp.tanh(x))
        return hk.Linear(2, name="head")(norm("norm_1")(x, is_training))

    return hk.transform_with_state(forward)


def make(decay):
    """The network, perturbed parameters, state, and apply in training mode."""
    net = network(decay)
    params, state = net.init(jax.random.key(0), BATCHES[0], True)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return net, jax.tree.unflatten(treedef, leaves), state, training(net)


def training(net):
    return lambda params, state, x: net.apply(params, state, None, x, True)


def expected_of(params, batches=BATCHES):
    first, norm, second = (params[name] for name in ("first", "norm_0", "second"))
    return two_layers(
        (first["w"], first["b"]),
        (norm["scale"], norm["offset"]),
        (second["w"], second["b"]),
        EPS,
        batches,
    )


def statistics(state, norm, field="average"):
    found = [state[f"{norm}/~/{name}"][field] for name in ("mean_ema", "var_ema")]
    return [x.reshape(x.shape[-1]) for x in found]


def assert_net(state, params, batches=BATCHES):
    for i, wanted in enumerate(expected_of(params, batches)):
        assert_statistics(statistics(state, f"norm_{i}"), wanted)


@pytest.mark.parametrize(
    ("decay", "steps"), [(0.9, 0), (0.99, 100), (0.999, 3), (0.9999, 1)]
)
def test_any_decay_at_any_counter(decay, steps):
    _, params, state, apply = make(decay)
    step = jax.jit(apply)
    for _ in range(steps):
        _, state = step(params, state, BATCHES[0])
    recomputed = frameworks.recompute_batch_stats(apply, params, state, BATCHES)
    assert_net(recomputed, params)
    assert structure(recomputed) == structure(state)
    # Inference normalises by them.
    mean = jnp.asarray(expected_of(params)[0][0], jnp.float32)
    norm = hk.transform_with_state(
        lambda x: hk.BatchNorm(True, True, decay, name="norm_0")(x, False)
    )
    out, _ = norm.apply(params, recomputed, None, mean[None])
    np.testing.assert_allclose(out, params["norm_0"]["offset"], atol=1e-5)
    # Training goes on from them, one batch being 1 - decay.
    _, after = step(params, recomputed, BATCHES[1])
    first = params["first"]
    rows = f64(BATCHES[1]) @ f64(first["w"]) + f64(first["b"])
    before = statistics(recomputed, "norm_0")
    pairs = zip(before, population([rows]), strict=True)
    wanted = [decay * f64(old) + (1 - decay) * new for old, new in pairs]
    assert_statistics(statistics(after, "norm_0"), wanted)


def test_under_jit():
    _, params, state, apply = make(0.99)
    jitted = jax.jit(apply)
    recomputed = frameworks.recompute_batch_stats(jitted, params, state, BATCHES)
    assert_net(recomputed, params)


@pytest.mark.slow
def test_under_pmap():
    """Devices see halves of each batch, and normalise by the whole of it."""
    _, params, state, _ = make(0.99)
    net = network(0.99, axis="devices")
    batches = [x[: len(x) // DEVICES * DEVICES] for x in BATCHES]
    split = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in batches]
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tree)  # noqa: E731
    recomputed = frameworks.recompute_batch_stats(
        training(net), stack(params), stack(state), split, axis_name="devices"
    )
    for device in range(DEVICES):
        here = jax.tree.map(lambda x, d=device: x[d], recomputed)
        assert_net(here, params, batches)


def test_keep_and_other_state():
    def forward(x, is_training):
        count = hk.get_state("count", (), jnp.int32, init=jnp.zeros)
        hk.set_state("count", count + 1)
        x = hk.SpectralNorm(name="spectral")(x)
        return hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)

    net: Any = hk.transform_with_state(forward)
    batches = [x[:3] for x in BATCHES]
    params, state = net.init(jax.random.key(0), batches[0], True)
    apply = training(net)
    with pytest.raises(ValueError, match=r"follows.*keep="):
        frameworks.recompute_batch_stats(apply, params, state, batches)
    recomputed = frameworks.recompute_batch_stats(
        apply, params, state, batches, keep=["spectral", "norm/~/var_ema"]
    )
    [module] = [m for m in state if "count" in state[m]]
    assert recomputed[module]["count"] == state[module]["count"] + len(batches)
    for name, value in state["spectral"].items():
        np.testing.assert_array_equal(recomputed["spectral"][name], value)
    old, new = (s["norm/~/var_ema"]["average"] for s in (state, recomputed))
    np.testing.assert_array_equal(new, old)


def test_an_average_that_is_not_debiased():
    def forward(x, is_training):
        hk.ExponentialMovingAverage(0.9, zero_debias=False, name="plain")(x.mean(0))
        return hk.BatchNorm(True, True, 0.9)(x, is_training)

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.key(0), BATCHES[0], True)
    with pytest.raises(ValueError, match=r"state\['plain'\].*zero_debias=True"):
        frameworks.recompute_batch_stats(training(net), params, state, BATCHES)


def test_misuse():
    net, params, state, apply = make(0.9)
    with pytest.raises(TypeError, match=r"apply must be a function.*got dict"):
        frameworks.recompute_batch_stats(params, state, apply, BATCHES)
    with pytest.raises(TypeError, match=r"state must be Haiku's.*got list"):
        frameworks.recompute_batch_stats(
            apply,
            params,
            [state],  # type: ignore[arg-type]
            BATCHES,
        )
    with pytest.raises(ValueError, match=r"apply must return \(output, state\)"):
        frameworks.recompute_batch_stats(
            lambda *given: apply(*given)[1], params, state, BATCHES
        )
    with pytest.raises(ValueError, match="unchanged"):
        frameworks.recompute_batch_stats(
            lambda p, s, x: net.apply(p, s, None, x, False), params, state, BATCHES
        )
    bad = [BATCHES[0], BATCHES[1] * np.nan]
    with pytest.raises(swa_jax.NonFiniteError, match=r"norm_0.*batch 2"):
        frameworks.recompute_batch_stats(apply, params, state, bad)
