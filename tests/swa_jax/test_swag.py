"""Samples of SWAG's Gaussian, against its mean and covariance in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swa_jax

from .transformations import U, bits, structure

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

SAMPLES = 40_000
#: Standard errors: of 30 numbers one in 10^5 runs is further away.
SIGMAS = 5.0


def run(models, rank=4, dtype=None, **options):
    """The state after some models, a pytree each."""
    average = swa_jax.swag(rank, **options)
    state = swa_jax.init_average(models[0], average)
    for model in models:
        state = swa_jax.update_average(state, model, average)
    return state


def trajectory(count, seed=0):
    """Correlated weights of two leaves, five in all."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(5, 5))
    flat = (3 + rng.normal(size=(count, 5)) @ mixing).astype(np.float32)
    return flat, [{"a": x[:2], "b": x[2:].reshape(3, 1)} for x in flat]


def moments(flat, rank):
    """Mean, diagonal and low-rank covariance, from the definition, in float64."""
    flat = flat.astype(np.float64)
    means = np.cumsum(flat, 0) / np.arange(1, len(flat) + 1)[:, None]
    deviations = (flat - means)[-rank:]
    low_rank = deviations.T @ deviations / max(len(deviations) - 1, 1)
    return means[-1], np.diag(flat.var(0)), low_rank


def flattened(sample):
    return np.concatenate(
        [np.asarray(sample[k], np.float64).reshape(SAMPLES, -1) for k in "ab"], 1
    )


def draw(state, params, **options):
    sample = functools.partial(swa_jax.swag_sample, **options)
    keys = jax.random.split(jax.random.key(1), SAMPLES)
    return jax.jit(jax.vmap(sample, (0, None, None)))(keys, state, params)


def assert_moments(found, mean, covariance):
    error = SIGMAS * np.sqrt(np.diag(covariance) / SAMPLES)
    np.testing.assert_array_less(np.abs(found.mean(0) - mean), error + 1e-5)
    # Of a normal sample, cov[i, j] has the variance (cii cjj + cij^2) / n.
    diagonal = np.diag(covariance)
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / SAMPLES)
    difference = np.abs(np.cov(found.T, bias=True) - covariance)
    np.testing.assert_array_less(difference, SIGMAS * spread + 1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("count", [3, 4, 11])
def test_samples_have_the_mean_and_covariance(count, scale):
    flat, models = trajectory(count)
    state = run(models)
    mean, diagonal, low_rank = moments(flat, 4)
    found = flattened(draw(state, models[0], scale=scale))
    assert_moments(found, mean, scale * (diagonal + low_rank) / 2)


@pytest.mark.parametrize(("rank", "count"), [(1, 9), (0, 9), (4, 1)])
def test_fewer_than_two_deviations_leave_the_diagonal_alone(rank, count):
    flat, models = trajectory(count)
    mean, diagonal, _ = moments(flat, max(rank, 1))
    found = flattened(draw(run(models, rank), models[0]))
    assert_moments(found, mean, diagonal)


def test_state_is_welfords_and_the_latest_deviations():
    flat, models = trajectory(11)
    flat, models = (
        flat + np.float32(300),
        [{k: v + np.float32(300) for k, v in m.items()} for m in models],
    )
    state = run(models)
    exact = flat.astype(np.float64)
    means = np.cumsum(exact, 0) / np.arange(1, 12)[:, None]
    join = lambda t: np.concatenate([t["a"].reshape(-1), t["b"].reshape(-1)])  # noqa: E731
    variance = join(jax.device_get(state.sq_deviations)) / 11
    # Deviations near 3 from a mean near 300 known to 2^-24: 1e-5 each.
    np.testing.assert_allclose(variance, exact.var(0), rtol=2e-4)
    for n in range(8, 12):  # the n-th model is in row (n - 1) % rank
        row = {k: v[(n - 1) % 4] for k, v in jax.device_get(state.deviations).items()}
        np.testing.assert_allclose(join(row), exact[n - 1] - means[n - 1], atol=2e-4)


def test_a_scale_of_0_is_the_mean_and_a_key_repeats():
    _, models = trajectory(6)
    state, params = run(models), models[0]
    sample = functools.partial(swa_jax.swag_sample, opt_state=state, params=params)
    key = jax.random.key(0)
    mean = swa_jax.averaged_params(state, params)
    assert bits(sample(key, scale=0)) == bits(mean)
    assert bits(sample(key)) == bits(sample(key))
    assert bits(sample(key)) == bits(sample(jax.random.PRNGKey(0)))
    assert bits(sample(key)) != bits(sample(jax.random.key(1)))
    jitted = jax.jit(swa_jax.swag_sample)(key, state, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jitted, sample(key)
    )


@pytest.mark.slow
def test_leaves_of_every_kind():
    def model(t):
        return {
            "bf16": jnp.full(4, t, jnp.bfloat16),
            "f8": jnp.full(2, t, jnp.float8_e4m3fn),
            "complex": jnp.full(3, t + 2j * t, jnp.complex64),
            "int": jnp.int32(t),
            "key": jax.random.key(t),
            "none": None,
            "hidden": optax.MaskedNode(),
        }

    state, params = run([model(t) for t in (1, 2, 3)]), model(9)
    found = swa_jax.swag_sample(jax.random.key(0), state, params)
    assert structure(found) == structure(params)
    for got, given in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert (got.dtype, got.shape) == (given.dtype, given.shape)
    assert int(found["int"]) == 3
    assert found["key"] == jax.random.key(3)
    # Real and imaginary part have spreads of their own, of 1 to 2.
    draws = draw(state, params)["complex"]
    variance = 2 / 3
    for part, factor in ((draws.real, 1), (draws.imag, 4)):
        low_rank = factor * (0.25 + 1) / 2  # deviations 0, 1/2 and 1
        expected = (factor * variance + low_rank) / 2
        np.testing.assert_allclose(part.var(0), expected, rtol=SIGMAS * 0.0071)
    # Independent up to the low-rank part, which both share.
    shared = 2 * (0.25 + 1) / 2 / 2
    found_cov = np.cov(np.stack([draws.real[:, 0], draws.imag[:, 0]]))[0, 1]
    np.testing.assert_allclose(found_cov, shared, rtol=0.1)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_sharded_samples_lie_where_the_parameters_do(axes):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axes,))
    spread = NamedSharding(mesh, P("x"))
    place = lambda t: {"w": jax.device_put(np.full((8, 2), t, np.float32), spread)}  # noqa: E731
    state = run([place(t) for t in (1.0, 2.0, 4.0)])
    params = place(0.0)
    with jax.set_mesh(mesh):
        for sample in (swa_jax.swag_sample, jax.jit(swa_jax.swag_sample)):
            found = sample(jax.random.key(0), state, params)["w"]
            assert found.sharding.is_equivalent_to(spread, 2)
            assert np.unique(np.asarray(found)).size == 16


def test_replicas_draw_the_same_sample():
    average = swa_jax.swag(3)
    models = [{"w": jnp.broadcast_to(jnp.arange(3.0) * t, (8, 3))} for t in range(5)]
    state = jax.vmap(lambda m: swa_jax.init_average(m, average))(models[0])
    step = jax.vmap(lambda s, m: swa_jax.averaged_with(s, m, average))
    for model in models:
        state = step(state, model)
    found = swa_jax.swag_sample(jax.random.key(0), state, models[0])["w"]
    assert found.shape == (8, 3)
    assert np.ptp(found, axis=0).max() == 0
    one = jax.tree.map(lambda x: x[0], (state, models[0]))
    expected = swa_jax.swag_sample(jax.random.key(0), *one)["w"]
    np.testing.assert_allclose(found[0], expected, rtol=8 * U)


def test_reading_before_the_start_warns_and_gives_the_parameters():
    params = {"w": jnp.arange(3.0)}
    state = swa_jax.init_average(params, swa_jax.swag(2))
    with pytest.warns(UserWarning, match="swag_sample: nothing has been aver") as seen:
        found = swa_jax.swag_sample(jax.random.key(0), state, params)
    assert seen[0].filename == __file__
    assert bits(found) == bits(params)


def test_found_in_any_optimizer():
    tx = optax.chain(
        optax.sgd(0.1), swa_jax.swa(), optax.named_chain(("g", swa_jax.swag(2)))
    )
    params = {"w": jnp.ones(3)}
    opt_state = tx.init(params)
    for _ in range(4):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    key = jax.random.key(0)
    found = [swa_jax.swag_sample(key, opt_state, params, which=w) for w in (None, "g")]
    assert bits(found[0]) == bits(found[1])
    with pytest.raises(TypeError, match="is a SWAState, but only a SWAGState"):
        swa_jax.swag_sample(key, opt_state, params, which=swa_jax.SWAState)


@pytest.mark.parametrize(
    ("key", "options", "error", "message"),
    [
        (0, {}, TypeError, "key must be one PRNG key, got 0"),
        (jnp.ones(2), {}, TypeError, "key must be one PRNG key, got an array"),
        (jax.random.split(jax.random.key(0)), {}, TypeError, "must be one PRNG key"),
        (
            jax.random.key(0),
            {"scale": -1},
            ValueError,
            "scale must be in .0, inf., got",
        ),
        (jax.random.key(0), {"scale": "1"}, TypeError, "scale must be a number, got"),
    ],
    ids=["number", "array", "keys", "negative", "string"],
)
def test_refused(key, options, error, message):
    _, models = trajectory(3)
    with pytest.raises(error, match=message):
        swa_jax.swag_sample(key, run(models), models[0], **options)
