"""Averages put together after training, against the profiles they stand for."""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import swa_jax
from swa_jax.averages import posthoc

from .transformations import U


def gamma_by_moments(sigma_rel):
    """By bisection of the standard deviation of (gamma + 1) t**gamma on [0, 1]."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        first, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
        low, high = (gamma, high) if second - first**2 > sigma_rel**2 else (low, gamma)
    return gamma


def profile(times, sigma_rel, step):
    """What each moment counts for in an average, as a density."""
    gamma = gamma_by_moments(sigma_rel)
    inside = (times > 0) & (times <= step)
    return np.where(inside, (gamma + 1) * (times / step) ** gamma / step, 0.0)


def stored(count, widths=(0.05, 0.1), until=1.0):
    """Snapshots at equal distances, of no weights yet."""
    steps = until * np.arange(1, count + 1) / count
    return [swa_jax.Snapshot(t, s, None) for t in steps for s in widths]


def coefficients(snapshots, **wanted):
    """What each snapshot counts for, by averaging unit vectors in float32."""
    size = len(snapshots)
    snapshots = [
        snapshot._replace(params=np.eye(size, dtype=np.float32)[i])
        for i, snapshot in enumerate(snapshots)
    ]
    return np.asarray(swa_jax.posthoc_ema(snapshots, **wanted), np.float64)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_gamma_has_the_width(sigma_rel):
    # float64 against a bisection whose differences lose five digits at 0.01.
    average = swa_jax.power_ema(sigma_rel)
    gamma = average.plan.kind.rule.gamma
    np.testing.assert_allclose(gamma, gamma_by_moments(sigma_rel), rtol=1e-9)
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    np.testing.assert_allclose(variance, sigma_rel**2, rtol=1e-10)


def test_products_are_the_integrals():
    kinds = [(0.5, 0.05), (1.0, 0.05), (1.0, 0.1), (0.7, 0.2), (0.25, 0.28)]
    steps, gammas = np.array([(t, gamma_by_moments(s)) for t, s in kinds]).T
    found = posthoc._products(steps[:, None], gammas[:, None], steps, gammas)
    for i, first in enumerate(kinds):
        for j, other in enumerate(kinds):
            expected, _ = scipy.integrate.quad(
                lambda t, a=first, b=other: (
                    profile(np.float64(t), a[1], a[0])
                    * profile(np.float64(t), b[1], b[0])
                ),
                0,
                min(first[0], other[0]),
            )
            np.testing.assert_allclose(found[i, j], expected, rtol=1e-6)


@pytest.mark.parametrize(("count", "error"), [(8, 1.2e-2), (16, 3.5e-3)])
def test_error_of_the_profile(count, error):
    # Measured when the method was chosen: so many of each of two widths.
    snapshots = stored(count)
    x = coefficients(snapshots, sigma_rel=0.075, step=1.0)
    times = np.linspace(1e-6, 1, 200_001)
    found = sum(
        c * profile(times, s.sigma_rel, s.step)
        for c, s in zip(x, snapshots, strict=True)
    )
    wanted = profile(times, 0.075, 1.0)
    relative = np.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum())
    assert 0.5 * error < relative < 1.1 * error


@pytest.mark.parametrize("index", [0, 5, 15])
def test_a_stored_average_comes_back(index):
    snapshots = stored(8)
    wanted = snapshots[index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first step has both widths only
        found = coefficients(snapshots, sigma_rel=wanted.sigma_rel, step=wanted.step)
    # The Gram matrix of sixteen has a condition number of some 1e4.
    np.testing.assert_allclose(found, np.eye(16)[index], atol=1e-6)


def test_weights_that_were_never_averaged():
    # A run of 2,000 models, whose average of width 0.075 was not kept.
    rng = np.random.default_rng(0)
    run = np.cumsum(rng.normal(size=(2000, 3)), 0).astype(np.float32) / 40
    snapshots = []
    for sigma_rel in (0.05, 0.1):
        average = swa_jax.power_ema(sigma_rel)
        state = swa_jax.init_average(run[0], average)
        for t, model in enumerate(run, 1):
            state = swa_jax.update_average(state, model, average)
            if t % 125 == 0:
                kept = np.array(state.avg_params)
                # Functions, as who loads them would pass.
                snapshots.append(
                    swa_jax.Snapshot(int(state.num_averaged), sigma_rel, kept.copy)
                )
    found = swa_jax.posthoc_ema(snapshots, sigma_rel=0.075, step=2000)
    weights = swa_jax.averaging_weights(swa_jax.power_ema(0.075), 2000)
    expected = weights @ run.astype(np.float64)
    others = [
        swa_jax.averaging_weights(swa_jax.power_ema(s), 2000) @ run for s in (0.05, 0.1)
    ]
    apart = min(np.abs(other - expected).max() for other in others)
    assert np.abs(found - expected).max() < 0.02 * apart


def test_later_snapshots_are_left_out_and_dtypes_kept():
    snapshots = [
        s._replace(params={"w": jnp.full(2, 10 * i, jnp.bfloat16), "n": jnp.int32(i)})
        for i, s in enumerate(stored(4, until=400))
    ]
    early = swa_jax.posthoc_ema(snapshots[:4], sigma_rel=0.07, step=200)
    found = swa_jax.posthoc_ema(iter(snapshots), sigma_rel=0.07, step=200)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found["w"], np.float32), np.asarray(early["w"], np.float32)
    )
    assert int(found["n"]) == 3  # of the last that was used


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"sigma_rel": 0.04, "step": 1}, "sigma_rel=0.04 lies outside.*0.05 to 0.1"),
        ({"sigma_rel": 0.12, "step": 1}, "lies outside the stored widths"),
        ({"sigma_rel": 0.07, "step": 1.5}, "latest snapshot is of step 1, before st"),
    ],
)
def test_less_accurate_results_are_told(wanted, message):
    with pytest.warns(UserWarning, match=message) as record:
        coefficients(stored(8), **wanted)
    assert record[0].filename == __file__


SAME = stored(2) + stored(1)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, float], str]] = {
    "none": (([],), {}, "none of 0 snapshots is of step=1 or before"),
    "late": ((stored(2),), {"step": 0.2}, "none of 4 snapshots is of step=0.2"),
    "twice": ((SAME,), {}, r"two snapshots have step=1 and sigma_rel=0\.05"),
    "one width": ((stored(8, (0.05,)),), {}, "all snapshots have sigma_rel=0.05"),
    "wide": ((stored(2),), {"sigma_rel": 0.3}, r"sigma_rel must be in \(0, 0.288675"),
    "narrow": ((stored(2),), {"sigma_rel": 0.0}, "sigma_rel must be in"),
    "step": ((stored(2),), {"step": 0}, r"step must be in \(0, inf\), got 0.0"),
    "stored": (([(1, 0.5, 0)],), {}, r"snapshots\[0\].sigma_rel must be in"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    arguments, wanted, message = BAD[case]
    sigma_rel, step = wanted.get("sigma_rel", 0.07), wanted.get("step", 1)
    with pytest.raises(ValueError, match=message):
        swa_jax.posthoc_ema(*arguments, sigma_rel=sigma_rel, step=step)


def test_one_width_at_a_stored_step_is_that_average():
    snapshots = [s._replace(params=np.float32(s.step)) for s in stored(4, (0.05,))]
    found = swa_jax.posthoc_ema(snapshots, sigma_rel=0.05, step=0.75)
    np.testing.assert_allclose(found, 0.75, rtol=8 * U)
