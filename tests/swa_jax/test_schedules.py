"""Schedules against their formulas in NumPy float64, at and around every boundary.

Tolerance: the schedules compute in float32 with fewer than ten roundings, each of
relative size 2**-24 of the larger end, so 1e-6 relative to that end has room.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import swa_jax

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

RATES = st.floats(2.0**-13, 1.0, width=32)
CURVES = {"linear": lambda x: x, "cos": lambda x: (1 - np.cos(np.pi * x)) / 2}


def evaluate(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32)))


def assert_schedule(schedule, expected, steps, scale):
    steps = np.asarray(steps)
    want = np.array([expected(int(t)) for t in steps])
    np.testing.assert_allclose(evaluate(schedule, steps), want, atol=1e-6 * scale)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(top=RATES, low=RATES, length=st.integers(0, 300), data=st.data())
def test_cosine_to_constant_follows_its_formula(top, low, length, data):
    warmup = data.draw(st.integers(0, length))
    schedule = swa_jax.cosine_to_constant_schedule(
        top, low, length, warmup_steps=warmup
    )

    def expected(t):
        if t >= length:
            return low
        if t < warmup:
            return top * t / warmup
        alpha = CURVES["cos"]((t - warmup) / (length - warmup))
        return top * (1 - alpha) + low * alpha

    assert_schedule(schedule, expected, range(length + 20), max(top, low))


def test_cosine_to_constant_agrees_with_optax():
    ours = swa_jax.cosine_to_constant_schedule(0.3, 0.06, 500, warmup_steps=50)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.3, 50, 500, end_value=0.06)
    steps = np.arange(600)
    np.testing.assert_allclose(
        evaluate(ours, steps), evaluate(theirs, steps), atol=3e-7
    )


@pytest.mark.parametrize("swa_lr", [0.017, 0.1, 0.37])
def test_boundaries_are_exact(swa_lr):
    top, want, start = np.float32(0.1), np.float32(swa_lr), 130
    schedules = {
        "cosine": (swa_jax.cosine_to_constant_schedule(0.1, swa_lr, start), 0, start),
        "warm": (
            swa_jax.cosine_to_constant_schedule(0.1, swa_lr, start, warmup_steps=30),
            30,
            start,
        ),
        "anneal": (swa_jax.swa_schedule(0.1, swa_lr, start, 7), start, start + 7),
        "line": (
            swa_jax.swa_schedule(0.1, swa_lr, start, 7, strategy="linear"),
            start,
            start + 7,
        ),
        "original": (
            swa_jax.linear_to_constant_schedule(0.1, swa_lr, start),
            65,  # half of 130
            117,  # nine tenths of 130
        ),
    }
    for name, (schedule, last_top, first_low) in schedules.items():
        rates = evaluate(schedule, [last_top, first_low - 1, first_low, 10**6])
        assert rates[0] == top, name
        assert rates[2] == rates[3] == want, name
        if swa_lr != 0.1:
            assert rates[1] != want, name


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    low=RATES,
    start=st.integers(0, 100),
    anneal=st.integers(0, 60),
    every=st.integers(1, 20),
    strategy=st.sampled_from(["cos", "linear"]),
)
def test_swa_schedule_follows_its_formula(low, start, anneal, every, strategy):
    base = optax.cosine_decay_schedule(0.4, 120)
    schedule = swa_jax.swa_schedule(
        base, low, start, anneal, strategy=strategy, update_every=every
    )

    def base64(t):
        return 0.4 * (1 + np.cos(np.pi * min(t, 120) / 120)) / 2

    def expected(t):
        if t < start:
            return base64(t)
        since = (t - start) // every * every
        x = min(1.0, since / anneal) if anneal else 1.0
        alpha = CURVES[strategy](x)
        return base64(start) * (1 - alpha) + low * alpha

    assert_schedule(schedule, expected, range(start + anneal + every + 5), 0.4 + low)


def test_swa_schedule_without_swa_lr_holds_the_rate_of_its_start():
    base = optax.linear_schedule(1.0, 0.0, 100)
    rates = evaluate(swa_jax.swa_schedule(base, None, 30, 10), range(60))
    np.testing.assert_array_equal(rates[30:], np.full(30, rates[30]))
    np.testing.assert_allclose(rates[:31], 1 - np.arange(31) / 100, atol=1e-6)


def test_swa_schedule_jumps_when_it_takes_no_steps():
    schedule = swa_jax.swa_schedule(0.1, 0.05, start_step=4, anneal_steps=0)
    np.testing.assert_array_equal(
        evaluate(schedule, range(6)), np.array([0.1] * 4 + [0.05] * 2, np.float32)
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(top=RATES, low=RATES, start=st.integers(0, 200))
def test_linear_to_constant_follows_the_original_repository(top, low, start):
    def expected(t):
        x = t / start if start else 1.0
        if x <= 0.5:
            return top
        if x <= 0.9:
            return top * (1 - (1 - low / top) * (x - 0.5) / 0.4)
        return low

    schedule = swa_jax.linear_to_constant_schedule(top, low, start)
    assert_schedule(schedule, expected, range(start + 10), max(top, low))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(top=RATES, low=RATES, cycle=st.integers(1, 30))
def test_cyclic_follows_the_paper(top, low, cycle):
    def expected(i):
        t = ((i % cycle) + 1) / cycle
        return (1 - t) * top + t * low

    schedule = swa_jax.cyclic_schedule(top, low, cycle)
    assert_schedule(schedule, expected, range(3 * cycle), max(top, low))
    ends = evaluate(schedule, np.arange(1, 4) * cycle - 1)
    np.testing.assert_array_equal(ends, np.full(3, np.float32(low)))


ALL = {
    "cosine": swa_jax.cosine_to_constant_schedule(0.1, 0.02, 40, warmup_steps=5),
    "swa": swa_jax.swa_schedule(optax.cosine_decay_schedule(0.1, 90), 0.02, 40, 20),
    "linear": swa_jax.linear_to_constant_schedule(0.1, 0.02, 40),
    "cyclic": swa_jax.cyclic_schedule(0.1, 0.02, 7),
}


@pytest.mark.parametrize("name", ALL)
def test_works_with_every_kind_of_step_and_inside_optimizers(name):
    schedule = ALL[name]
    want = evaluate(schedule, range(60))
    assert want.dtype == np.float32
    for step in (0, 7, np.int64(41), jnp.int32(59), 13.0):
        rate = schedule(step)
        assert rate.shape == ()
        np.testing.assert_allclose(rate, want[int(step)], rtol=1e-6)

    # inject_hyperparams traces the schedule and shows the rate that it used.
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    params = jnp.zeros(())

    def train(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.ones(()), state, params)
        rate = state.hyperparams["learning_rate"]
        return (optax.apply_updates(params, updates), state), (rate, updates)

    _, (rates, updates) = jax.lax.scan(train, (params, tx.init(params)), None, 60)
    np.testing.assert_allclose(rates, want, rtol=1e-6)
    np.testing.assert_allclose(updates, -want, rtol=1e-6)

    joined = optax.join_schedules([optax.constant_schedule(0.5), schedule], [10])
    np.testing.assert_allclose(evaluate(joined, range(10, 70)), want, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_is_differentiable_and_finite_far_out(name):
    far = evaluate(ALL[name], [2**24 + 1, 2**31 - 1])
    assert ((far >= 0.02 - 1e-8) & (far <= 0.1)).all()

    def rate(top):
        return swa_jax.swa_schedule(top, 0.02, 4, 10)(9)

    # d/dtop of top (1 - a) + low a at x = 1/2 is 1/2.
    np.testing.assert_allclose(jax.grad(rate)(0.1), 0.5, rtol=1e-6)


SHORT = {
    "cosine": swa_jax.cosine_to_constant_schedule(0.4, 0.1, 15, warmup_steps=6),
    "swa": swa_jax.swa_schedule(lambda step: 0.4 - 0.001 * step, 0.1, 15, 6),
    "linear": swa_jax.linear_to_constant_schedule(0.4, 0.1, 15),
    "cyclic": swa_jax.cyclic_schedule(0.4, 0.1, 7),
    "recipe": swa_jax.SWA(0.5, 2, 0.1).schedule(0.4, 10, 3),
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("dtype", [np.uint32, np.uint8, np.int8, np.int16])
def test_steps_of_any_integer_dtype(name, dtype):
    """Flax's nnx.Optimizer counts in uint32: 3 - 15 must not wrap around there."""
    steps = np.arange(40)
    expected = [SHORT[name](int(step)) for step in steps]
    narrow = [SHORT[name](dtype(step)) for step in steps]
    np.testing.assert_array_equal(narrow, expected)
    traced = jax.vmap(SHORT[name])(jnp.asarray(steps, dtype))
    np.testing.assert_array_equal(traced, jax.vmap(SHORT[name])(jnp.asarray(steps)))
    assert len(set(map(float, expected))) > 2


def test_step_of_an_nnx_optimizer():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    assert float(SHORT["swa"](optimizer.step[...])) == np.float32(0.4)


# In NumPy's float64, from the docstrings' formulas, with 0.4 and 0.01 or so as rates.
ORACLES = {
    "cosine": (
        lambda top, low: swa_jax.cosine_to_constant_schedule(
            top, low, 40, warmup_steps=7
        ),
        lambda top, low, t: (
            top * t / 7
            if t < 7
            else top + (low - top) * CURVES["cos"](min(1.0, (t - 7) / 33))
        ),
    ),
    "swa": (
        lambda top, low: swa_jax.swa_schedule(top, low, 11, 27, update_every=4),
        lambda top, low, t: (
            top + (low - top) * CURVES["cos"](min(1.0, max(0, (t - 11) // 4 * 4 / 27)))
        ),
    ),
    "linear": (
        lambda top, low: swa_jax.linear_to_constant_schedule(top, low, 40),
        lambda top, low, t: top + (low - top) * min(1.0, max(0, (t / 40 - 0.5) / 0.4)),
    ),
    "cyclic": (
        lambda top, low: swa_jax.cyclic_schedule(top, low, 7),
        lambda top, low, t: top + (low - top) * (t % 7 + 1) / 7,
    ),
    "recipe": (  # of 13 epochs of 3 steps the first is that of the end of epoch 6
        lambda top, low: swa_jax.SWA(0.5, 5, low).schedule(top, 13, 3),
        lambda top, low, t: (
            top + (low - top) * CURVES["cos"](min(1.0, max(0, (t // 3 - 6) / 5)))
        ),
    ),
}
STEP_KINDS = (int, np.int64, jnp.int32, jnp.uint32, jnp.int64, float, jnp.float32)
RATE_KINDS = (float, np.float32, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
@pytest.mark.parametrize("name", ORACLES)
def test_steps_and_rates_of_any_kind_under_strict_settings(
    request, name, promotion, bits
):
    """No transfer but explicit ones, and no promotion that is not asked for."""
    if bits == 64:
        request.getfixturevalue("enable_x64")
    make, oracle = ORACLES[name]
    step_kinds = [kind for kind in STEP_KINDS if bits == 64 or kind is not jnp.int64]
    for rate_kind in RATE_KINDS:
        top, low = rate_kind(0.4), rate_kind(0.0123)
        steps = {(k, t): k(t) for k in step_kinds for t in (3, 24)}
        on_device = {t: jnp.int32(t) for t in (3, 24)}
        with jax.numpy_dtype_promotion(promotion), jax.transfer_guard("disallow"):
            schedule = make(top, low)
            rates: dict[tuple[Any, int], Any]
            rates = {key: schedule(step) for key, step in steps.items()}
            traced = jax.jit(schedule)
            rates |= {("traced", t): traced(step) for t, step in on_device.items()}
        for (step_kind, t), rate in rates.items():
            assert rate.shape == ()
            wide = bits == 64 and step_kind in (np.int64, jnp.int64)
            wide |= bits == 64 and step_kind in (int, float) and rate_kind is float
            assert rate.dtype == (jnp.float64 if wide else jnp.float32), step_kind
            expected = oracle(float(top), float(low), t)
            exact = wide and rate_kind is float
            np.testing.assert_allclose(
                rate, expected, rtol=0, atol=1e-15 if exact else 4e-7
            )


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["swa", "recipe"])
def test_optax_schedules_as_base_under_strict_settings(request, name, bits):
    if bits == 64:
        request.getfixturevalue("enable_x64")
    schedule = ORACLES[name][0](optax.cosine_decay_schedule(0.4, 80), 0.01)
    step = jnp.int32(5)
    with jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow"):
        rate = schedule(step)
    expected = 0.4 * (1 + np.cos(np.pi * 5 / 80)) / 2
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


LONG = 2**31 - 1


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32, int])
def test_the_longest_schedules_that_can_be_counted(request, bits, dtype):
    if bits == 64:
        request.getfixturevalue("enable_x64")
    schedules = {
        "cosine": swa_jax.cosine_to_constant_schedule(
            0.4, 0.1, LONG, warmup_steps=LONG
        ),
        "swa": swa_jax.swa_schedule(0.4, 0.1, LONG - 8, LONG, strategy="linear"),
        "late": swa_jax.swa_schedule(0.4, 0.1, 0, LONG, update_every=LONG),
        "linear": swa_jax.linear_to_constant_schedule(0.4, 0.1, LONG),
        "cyclic": swa_jax.cyclic_schedule(0.4, 0.1, LONG),
    }
    oracles = {
        "cosine": lambda t: 0.4 * t / LONG if t < LONG else 0.1,
        "swa": lambda t: 0.4 - 0.3 * max(0, t - LONG + 8) / LONG,
        "late": lambda t: 0.4 if t < LONG else 0.1,
        "linear": lambda t: 0.4 - 0.3 * min(1, max(0, (t / LONG - 0.5) / 0.4)),
        "cyclic": lambda t: 0.4 - 0.3 * (t % LONG + 1) / LONG,
    }
    for name, schedule in schedules.items():
        for t in (0, 1, 2**30, 2**30 + 2**29, LONG - 1000, LONG):
            rate = schedule(dtype(t))
            np.testing.assert_allclose(rate, oracles[name](t), atol=4e-7, err_msg=name)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [2**31, 2**40, np.int64(2**31)])
def test_longer_ones_are_refused_when_they_are_made(request, bits, length):
    if bits == 64:
        request.getfixturevalue("enable_x64")
    for make in (
        lambda: COSINE(0.1, 0.05, length),
        lambda: COSINE(0.1, 0.05, 3, warmup_steps=length),
        lambda: SWA(0.1, 0.05, length, 1),
        lambda: SWA(0.1, 0.05, 1, length),
        lambda: SWA(0.1, 0.05, 1, 1, update_every=length),
        lambda: LINEAR(0.1, 0.05, length),
        lambda: CYCLIC(0.1, 0.05, length),
    ):
        with pytest.raises(ValueError, match=r"must be at most 2147483647 \(int32\)"):
            make()


@pytest.mark.parametrize("name", SHORT)
def test_steps_that_would_wrap_around(name):
    """A host's integers are refused; a counter on the device stays at its end."""
    for step in (2**31, np.int64(2**40), np.uint32(2**31)):
        with pytest.raises(ValueError, match=r"step must be at most 2147483647, got"):
            SHORT[name](step)
    stays = [SHORT[name](jnp.uint32(t)) for t in (2**31 - 1, 2**31, 2**32 - 1)]
    assert stays[0] == stays[1] == stays[2] == SHORT[name](2**31 - 1)


COSINE = swa_jax.cosine_to_constant_schedule
SWA = swa_jax.swa_schedule
LINEAR = swa_jax.linear_to_constant_schedule
CYCLIC = swa_jax.cyclic_schedule
BAD = {
    "decay": (lambda: COSINE(0.1, 0.05, -1), "decay_steps must be at least 0.*got -1"),
    "warmup": (
        lambda: COSINE(0.1, 0.05, 9, warmup_steps=-2),
        "warmup_steps must be at least 0.*got -2",
    ),
    "warmup longer": (
        lambda: COSINE(0.1, 0.05, 9, warmup_steps=10),
        "warmup_steps=10 is more than decay_steps=9.*includes",
    ),
    "start": (lambda: SWA(0.1, 0.05, -3, 1), "start_step must be at least 0.*got -3"),
    "anneal": (lambda: SWA(0.1, 0.05, 3, -1), "anneal_steps must be at least 0.*-1"),
    "every": (
        lambda: SWA(0.1, 0.05, 3, 1, update_every=0),
        "update_every must be at least 1.*got 0",
    ),
    "strategy": (
        lambda: SWA(0.1, 0.05, 3, 1, strategy="cosine"),  # type: ignore[arg-type]
        "strategy must be one of 'cos', 'linear', got 'cosine'",
    ),
    "original": (lambda: LINEAR(0.1, 0.05, -1), "start_step must be at least 0.*-1"),
    "cycle": (lambda: CYCLIC(0.1, 0.05, 0), "cycle_steps must be at least 1.*got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lengths_and_strategies_are_value_errors(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: COSINE(0.1, 0.05, x),
        lambda x: SWA(0.1, 0.05, x, 1),
        lambda x: SWA(0.1, 0.05, 1, x),
        lambda x: LINEAR(0.1, 0.05, x),
        lambda x: CYCLIC(0.1, 0.05, x),
    ],
)
@pytest.mark.parametrize("length", [2.5, "3", None])
def test_lengths_that_are_no_integers_are_type_errors(make, length):
    with pytest.raises(
        TypeError, match=r"_steps? must be an integer.*multiply epochs by"
    ):
        make(length)


MAKES = {
    "init_value": lambda rate: COSINE(rate, 0.1, 3),
    "swa_lr": lambda rate: COSINE(0.1, rate, 3),
    "swa_lr ": lambda rate: SWA(0.1, rate, 3, 1),
    "base": lambda rate: SWA(rate, 0.1, 3, 1),
    "init_value ": lambda rate: LINEAR(rate, 0.1, 3),
    "swa_lr  ": lambda rate: LINEAR(0.1, rate, 3),
    "max_value": lambda rate: CYCLIC(rate, 0.1, 3),
    "min_value": lambda rate: CYCLIC(0.1, rate, 3),
}


@pytest.mark.parametrize("name", MAKES)
def test_rates_are_checked_when_a_schedule_is_made(name):
    rate: Any
    for rate in (-0.1, np.nan, np.float32(np.inf), jnp.array(-1.0)):
        with pytest.raises(ValueError, match=f"{name.strip()} must be finite and not"):
            MAKES[name](rate)
    wrong = ("0.1", [0.1, 0.2], np.ones(1), True, np.bool_(True), jnp.array(1j))
    for rate in (*wrong, jax.random.key(0), jnp.arange(1000.0)):
        message = f"{name.strip()} must be a learning rate"
        with pytest.raises(TypeError, match=message) as error:
            MAKES[name](rate)
        assert len(str(error.value)) < 300
    jax.jit(lambda rate: MAKES[name](rate)(1))(0.1)  # not known yet: passes


@pytest.mark.parametrize("base", ["0.1", [0.1, 0.2], np.ones(3), None, True])
def test_a_base_that_is_neither_rate_nor_schedule_is_a_type_error(base):
    with pytest.raises(TypeError, match="base must be a learning rate or a schedule"):
        SWA(base, 0.05, 3, 1)
