"""The published hyperparameters: when `SWA` acts, what it does, and that it is pure."""

import copy
import dataclasses
import fractions
import inspect
import math
import pickle
from typing import Any, NamedTuple, assert_type

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swa_jax
from swa_jax import SWA, Event, TrainingState
from swa_jax.recipe._state import RecipeState, StateT
from swa_jax.typing import Rate

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

U = 2.0**-24  # float32's unit roundoff


def fresh_state(num_epochs: int = 10, **fields: Any) -> TrainingState:
    """A state before training, of one weight and no statistics."""
    state = TrainingState(
        epoch=0,
        num_epochs=num_epochs,
        params={"w": jnp.zeros(2)},
        batch_stats={},
        learning_rate=0.1,
    )
    return state._replace(**fields)


def carried(state: TrainingState) -> RecipeState:
    """What the recipe keeps, once training has begun."""
    assert state.swa is not None
    return state.swa


def at_epoch_end(state: StateT, epoch: int, weight: float) -> StateT:
    return state._replace(epoch=epoch, params={"w": jnp.full(2, weight)})


def run(recipe: SWA, weights: list[float], state: StateT) -> StateT:
    """All events of a training run whose epochs end at the given weights."""
    state = recipe.apply(Event.TRAINING_START, state)
    for epoch, weight in enumerate(weights):
        state = at_epoch_end(state, epoch, weight)
        if recipe.match(Event.EPOCH_END, state):
            state = recipe.apply(Event.EPOCH_END, state)
    return recipe.apply(Event.TRAINING_END, state)


# The contract.


def test_signatures_are_the_contract():
    parameters = inspect.signature(SWA).parameters
    assert {k: p.default for k, p in list(parameters.items())[:4]} == {
        "swa_start": 0.8,
        "anneal_epochs": 10,
        "swa_lr": None,
        "anneal_strategy": "cos",
    }
    kinds = [p.kind for p in parameters.values()]
    assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
    assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
    names = ("schedule", "transform", "match", "apply")
    assert [list(inspect.signature(getattr(SWA, n)).parameters) for n in names] == [
        ["self", "base", "num_epochs", "steps_per_epoch"],
        ["self", "num_epochs", "steps_per_epoch"],
        ["self", "event", "state"],
        ["self", "event", "state", "logger", "batch_stats_fn", "train_batches"],
    ]
    contract = ("epoch", "num_epochs", "params", "batch_stats", "learning_rate", "swa")
    assert TrainingState._fields[:6] == contract
    assert TrainingState._field_defaults["swa"] is None
    assert [e.name for e in Event] == [
        "TRAINING_START",
        "EPOCH_START",
        "BATCH_START",
        "BATCH_END",
        "EPOCH_END",
        "TRAINING_END",
    ]


def test_a_recipe_is_a_value():
    assert SWA() == SWA(0.8, 10, None)
    assert len({SWA(), SWA(0.8), SWA(0.7)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        SWA().swa_lr = 0.1  # type: ignore[misc]


def test_of_ten_epochs_the_last_two_are_averaged():
    """The figures of the issue: Composer's first release, N = 10, 0.8: 9 and 10."""
    recipe = SWA()
    matched = [
        e for e in range(10) if recipe.match(Event.EPOCH_END, fresh_state(epoch=e))
    ]
    assert matched == [8, 9]  # counted from 0
    state = run(recipe, [float(n) for n in range(1, 11)], fresh_state())
    np.testing.assert_array_equal(state.params["w"], [9.5, 9.5])
    assert swa_jax.swa_state(state.swa).num_averaged == 2


@pytest.mark.parametrize("event", [e for e in Event if e is not Event.EPOCH_END])
@pytest.mark.parametrize("epoch", [0, 8, 9])
def test_other_events(event, epoch):
    """Start and end of training match at any epoch; nothing else ever does."""
    state = fresh_state(epoch=epoch)
    assert SWA().match(event, state) is (
        event.name in ("TRAINING_START", "TRAINING_END")
    )


def test_events_may_be_given_by_value():
    assert SWA().match("epoch_end", fresh_state(epoch=8))


# Both forms, and the published rule.


def published_run(
    recipe: SWA, base: np.ndarray, steps: int, grads: np.ndarray
) -> tuple[np.ndarray, float, list[int]]:
    """The published rule in float64, epoch by epoch: rates, average, averaged epochs.

    Written from DESIGN.md's prose and algorithm 1 of the paper, with no code of ours.
    """
    epochs = len(grads) // steps
    weight, lr0 = 0.0, math.nan
    rates: list[float] = []
    snapshots: list[float] = []
    averaged: list[int] = []
    for epoch in range(epochs):
        for step in range(epoch * steps, (epoch + 1) * steps):
            k = len(snapshots)
            if k == 0:
                rate = float(base[step])
            else:
                end = lr0 if recipe.swa_lr is None else float(recipe.swa_lr)
                x = min(1.0, k / recipe.anneal_epochs)
                if recipe.anneal_strategy == "cos":
                    x = (1 - math.cos(math.pi * x)) / 2
                rate = lr0 + (end - lr0) * x
            rates.append(rate)
            weight -= rate * float(grads[step])
        if epoch >= int(recipe.swa_start * epochs):
            lr0 = rates[-1] if not snapshots else lr0
            snapshots.append(weight)
            averaged.append(epoch)
    return np.array(rates), float(np.mean(snapshots)), averaged


def optax_run(
    recipe: SWA, base: optax.Schedule, steps: int, grads: np.ndarray
) -> tuple[np.ndarray, Any, int]:
    """`schedule` and `transform` inside an optimizer."""
    epochs = len(grads) // steps
    schedule = recipe.schedule(base, epochs, steps)
    tx = optax.chain(optax.sgd(schedule), recipe.transform(epochs, steps))

    def step(carry: Any, grad: jax.Array) -> Any:
        params, opt_state = carry
        updates, opt_state = tx.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    start = jnp.zeros(())
    (params, opt_state), _ = jax.lax.scan(
        step, (start, tx.init(start)), jnp.asarray(grads)
    )
    count = swa_jax.swa_state(opt_state).num_averaged
    rates = jax.vmap(schedule)(jnp.arange(len(grads)))
    return np.asarray(rates), swa_jax.swa_params(opt_state, params), int(count)


def loop_run(
    recipe: SWA, base: optax.Schedule, steps: int, grads: np.ndarray
) -> tuple[np.ndarray, Any, int]:
    """`match` and `apply` in a loop that does its own updates."""
    epochs = len(grads) // steps
    state = fresh_state(
        epochs, params=np.float32(0), num_updates=0, steps_per_epoch=steps
    )
    state = recipe.apply(Event.TRAINING_START, state)
    rates = []

    def end(event: Event) -> None:
        nonlocal state
        if recipe.match(event, state):
            state = recipe.apply(event, state)

    for epoch in range(epochs):
        state = state._replace(epoch=epoch)
        for step in range(epoch * steps, (epoch + 1) * steps):
            if swa_jax.swa_state(state.swa).num_averaged == 0:
                state = state._replace(learning_rate=base(step))
            rates.append(state.learning_rate)
            moved = state.params - np.float32(state.learning_rate) * grads[step]
            state = state._replace(params=np.float32(moved), num_updates=step + 1)
            end(Event.BATCH_END)
        end(Event.EPOCH_END)
    average = swa_jax.swa_params(state.swa, state.params)
    count = int(swa_jax.swa_state(state.swa).num_averaged)
    return np.asarray(rates), average, count


rates_of = st.floats(2**-10, 1.0, width=32)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    epochs=st.integers(1, 8),
    steps=st.integers(1, 3),
    start=st.floats(0.01, 0.99),
    anneal=st.integers(1, 9),
    swa_lr=st.none() | rates_of,
    strategy=st.sampled_from(["cos", "linear"]),
    top=rates_of,
    seed=st.integers(0, 2**31),
)
def test_both_forms_are_the_published_rule(
    epochs, steps, start, anneal, swa_lr, strategy, top, seed
):
    recipe = SWA(start, anneal, swa_lr, anneal_strategy=strategy)
    grads = np.random.default_rng(seed).normal(size=epochs * steps).astype(np.float32)
    base = optax.exponential_decay(top, 7, 0.9)
    base_rates = np.asarray(jax.vmap(base)(jnp.arange(epochs * steps)))
    rates, average, averaged = published_run(recipe, base_rates, steps, grads)
    highest = max(top, swa_lr or 0.0)
    # The blend rounds its cosine, its product, its difference and its sum, and lr0's
    # power once more than vmap does: below 12 U. Rates and averages then carry the
    # rounding of every weight so far: 24 steps of at most |weight| <= 24 * 5 * rate.
    for form in (optax_run, loop_run):
        got_rates, got_average, count = form(recipe, base, steps, grads)
        np.testing.assert_allclose(got_rates, rates, rtol=0, atol=12 * U * highest)
        assert count == len(averaged)
        np.testing.assert_allclose(
            got_average, average, rtol=0, atol=1000 * U * highest
        )


def test_rates_epoch_by_epoch():
    """By hand: of N = 10 from epoch 5 on, linearly from 0.4 to 0 in 4 epochs."""
    recipe = SWA(0.5, 4, 0.0, anneal_strategy="linear")
    schedule = recipe.schedule(0.4, num_epochs=10, steps_per_epoch=3)
    rates = np.array([schedule(step) for step in range(30)]).reshape(10, 3)
    expected = [0.4] * 6 + [0.3, 0.2, 0.1, 0.0]
    np.testing.assert_allclose(rates, np.repeat(np.c_[expected], 3, 1), rtol=3 * U)


def test_without_swa_lr_the_rate_stays():
    base = optax.linear_schedule(1.0, 0.0, 40)
    rates = jax.vmap(SWA(0.5, 3).schedule(base, 10, 4))(jnp.arange(40))
    np.testing.assert_array_equal(rates[:24], jax.vmap(base)(jnp.arange(24)))
    np.testing.assert_array_equal(rates[24:], np.full(16, base(23)))


@pytest.mark.parametrize("swa_lr", [0.0, 0.3, 2.0])
def test_the_given_rate_is_honoured(swa_lr):
    """A released Composer overwrites it with the optimizer's own."""
    assert SWA(0.5, 1, swa_lr).schedule(0.1, 4, 5)(19) == np.float32(swa_lr)
    state = fresh_state(4)
    state = run(SWA(0.5, 1, swa_lr), [1.0, 2.0, 3.0, 4.0], state)
    assert state.learning_rate == np.float32(swa_lr)


# Later hyperparameters.


def test_time_strings_of_the_issue():
    """N = 10: later Composer "8ep" averages the ends of epochs 8, 9, 10."""
    weights = [float(n) for n in range(1, 11)]
    for start in ("8ep", "0.8dur", "0.75dur"):
        state = run(SWA(start), weights, fresh_state())
        np.testing.assert_array_equal(state.params["w"], [9.0, 9.0])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_windows_by_brute_force(data):
    """Every tick of training, asked one by one, against exact elapsed time."""
    epochs, steps = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    tick_of = {"ep": steps, "ba": 1}

    def time(name: str) -> tuple[str, fractions.Fraction]:
        """A time string and the batches that it stands for."""
        unit = data.draw(st.sampled_from(["dur", "ep", "ba"]), name)
        if unit == "dur":
            tenths = data.draw(st.integers(1, 100), name)
            return f"{tenths / 100}dur", fractions.Fraction(
                tenths, 100
            ) * epochs * steps
        most = epochs * steps // tick_of[unit]
        value = data.draw(st.integers(1, most), name)
        return f"{value}{unit}", fractions.Fraction(value * tick_of[unit])

    start: float | str
    if data.draw(st.booleans(), "published rule"):
        start = data.draw(st.integers(1, 99), "start") / 100
        start_at = fractions.Fraction((int(start * epochs) + 1) * steps)
    else:
        start, start_at = time("start")
    end: str | None = None
    end_at = fractions.Fraction(epochs * steps)
    if data.draw(st.booleans(), "ends"):
        end, end_at = time("end")
    unit = data.draw(st.sampled_from(["ep", "ba"]))
    every = data.draw(st.integers(1, 4))
    size = tick_of[unit]
    recipe = SWA(start, swa_end=end, update_interval=f"{every}{unit}")

    reached = [b for b in range(size, epochs * steps + 1, size) if b >= start_at]
    last = next(b for b in range(size, epochs * steps + 1, size) if b >= end_at)
    sampled = [b for b in reached[::every] if b <= last]
    event = Event.EPOCH_END if unit == "ep" else Event.BATCH_END
    state = fresh_state(epochs, steps_per_epoch=steps)
    if not sampled:
        with pytest.raises(ValueError, match="averaging window is empty"):
            recipe.match(event, state._replace(num_updates=1))
        return

    def matches(batches: int) -> bool:
        epoch = (batches - 1) // steps  # that of the last batch
        return recipe.match(event, state._replace(epoch=epoch, num_updates=batches))

    matched = [b for b in range(size, epochs * steps + 1, size) if matches(b)]
    # Also where training continues from the average, if that is before its end.
    ends = {last} if last < epochs * steps else set()
    assert matched == sorted({*sampled, *ends})
    # Inside optax the same are averaged: weights that tell the batch they end.
    tx = recipe.transform(epochs, steps)
    numbers = jnp.arange(1, epochs * steps + 1)

    def update(opt_state: Any, number: jax.Array) -> Any:
        _, new = tx.update(jnp.zeros(()), opt_state, number.astype(jnp.float32))
        return new, new.num_averaged

    _, counts = jax.lax.scan(update, tx.init(jnp.zeros(())), numbers)
    entered = np.flatnonzero(np.diff(np.asarray(counts), prepend=0)) + 1
    assert list(entered) == sampled


@pytest.mark.parametrize("interval", ["1ep", "2ep", "2ba", "3ba"])
@pytest.mark.parametrize("end", [None, "0.7dur", "9ep"])
@pytest.mark.parametrize("start", ["5ep", 0.4])
def test_both_forms_agree_with_later_hyperparameters(interval, end, start):
    """Up to swa_end, after which the loop goes on from the average."""
    recipe = SWA(start, 3, 0.02, swa_end=end, update_interval=interval)
    grads = np.random.default_rng(0).normal(size=40).astype(np.float32)
    base = optax.cosine_decay_schedule(0.1, 60)
    rates, average, count = optax_run(recipe, base, 4, grads)
    loop_rates, loop_average, loop_count = loop_run(recipe, base, 4, grads)
    np.testing.assert_allclose(loop_rates, rates, rtol=0, atol=4 * U * 0.1)
    assert loop_count == count >= 2
    np.testing.assert_allclose(loop_average, average, rtol=0, atol=1000 * U * 0.1)
    assert len(set(rates.tolist())) > 20  # the base moves, then the anneal


def test_after_swa_end_training_continues_from_the_average():
    recipe = SWA("2ep", swa_end="4ep", swa_lr=0.05, anneal_epochs=2)
    state = recipe.apply(Event.TRAINING_START, fresh_state(6))
    for epoch in range(4):
        state = at_epoch_end(state, epoch, float(epoch + 1))
        state = recipe.apply(Event.EPOCH_END, state)
    np.testing.assert_array_equal(state.params["w"], [3.0, 3.0])  # of 2, 3, 4
    assert state.learning_rate == np.float32(0.05)
    for epoch, weight in ((4, 7.0), (5, 8.0)):  # no longer averaged
        state = at_epoch_end(state, epoch, weight)
        assert not recipe.match(Event.EPOCH_END, state)
        assert recipe.apply(Event.EPOCH_END, state) is state
    # What training made of the average is the result, with the statistics it left.
    final = recipe.apply(
        Event.TRAINING_END, state._replace(batch_stats={"mean": jnp.ones(2)})
    )
    np.testing.assert_array_equal(final.params["w"], [8.0, 8.0])
    np.testing.assert_array_equal(final.batch_stats["mean"], [1.0, 1.0])


def test_training_that_stops_before_swa_end_ends_with_the_average():
    recipe = SWA("2ep", swa_end="6ep")
    state, extras = network_state()
    state = recipe.apply(Event.TRAINING_START, state._replace(num_epochs=8))
    for epoch in range(4):
        state = at_epoch_end(state, epoch, float(epoch + 1))
        state = recipe.apply(Event.EPOCH_END, state)
    final = recipe.apply(Event.TRAINING_END, state, **extras)
    np.testing.assert_array_equal(final.params["w"], [3.0, 3.0])  # of 2, 3, 4
    rows = 3 * np.concatenate([np.asarray(b) for b in extras["train_batches"]()])
    np.testing.assert_allclose(final.batch_stats["mean"], rows.mean(0), rtol=8 * U)


def test_swa_end_between_samples_also_ends():
    """Models after 2 and 5 epochs; the average is put in place after 6."""
    recipe = SWA("2ep", swa_end="6ep", update_interval="3ep")
    state = recipe.apply(Event.TRAINING_START, fresh_state(8))
    logged: list[dict[str, float]] = []
    for epoch in range(6):
        state = at_epoch_end(state, epoch, float(epoch + 1))
        state = recipe.apply(Event.EPOCH_END, state, logged.append)
    np.testing.assert_array_equal(state.params["w"], [3.5, 3.5])
    assert len(logged) == 2


def test_anneal_stays_in_epochs_when_averaging_in_batches():
    """From 0.4 to 0.0 within 2 epochs of 4 batches, moved every 2 batches."""
    recipe = SWA("1ep", 2, 0.0, anneal_strategy="linear", update_interval="2ba")
    rates = jax.vmap(recipe.schedule(0.4, 4, 4))(jnp.arange(16))
    expected = [0.4] * 4 + [0.3] * 2 + [0.2] * 2 + [0.1] * 2 + [0.0] * 6
    np.testing.assert_allclose(rates, expected, rtol=3 * U, atol=0)


@pytest.mark.parametrize("epoch", [3, 4], ids=["the epoch's own", "counted on"])
def test_training_that_stops_at_swa_end_gets_statistics_of_the_average(epoch):
    """No step followed: what training left are the statistics of other weights."""
    recipe = SWA("2ep", swa_end="4ep")
    state, extras = network_state()
    state = recipe.apply(Event.TRAINING_START, state._replace(num_epochs=6))
    for n in range(4):
        state = recipe.apply(Event.EPOCH_END, at_epoch_end(state, n, float(n + 1)))
    state = state._replace(epoch=epoch)
    with pytest.raises(ValueError, match="batch_stats_fn must be a function"):
        recipe.apply(Event.TRAINING_END, state)
    final = recipe.apply(Event.TRAINING_END, state, **extras)
    np.testing.assert_array_equal(final.params["w"], [3.0, 3.0])  # of 2, 3, 4
    rows = 3 * np.concatenate([np.asarray(b) for b in extras["train_batches"]()])
    np.testing.assert_allclose(final.batch_stats["mean"], rows.mean(0), rtol=8 * U)
    np.testing.assert_allclose(final.batch_stats["var"], rows.var(0), rtol=32 * U)
    # One step, however small, and the statistics are those of training.
    w = jnp.asarray(np.nextafter(np.full(2, 3, np.float32), np.float32(4)))
    state = state._replace(params={"w": w}, batch_stats={"mean": 5.0, "var": 6.0})
    assert recipe.apply(Event.TRAINING_END, state, **extras) is state


@pytest.mark.parametrize("skipped", [False, True], ids=["missed", "not finite"])
def test_swa_end_without_any_model_installs_nothing(skipped):
    recipe = SWA("2ep", swa_end="4ep", update_interval="3ep", skip_nonfinite=True)
    state = recipe.apply(Event.TRAINING_START, fresh_state(6))
    if skipped:
        state = recipe.apply(Event.EPOCH_END, at_epoch_end(state, 1, math.nan))
    state = recipe.apply(Event.EPOCH_END, at_epoch_end(state, 3, 4.0))
    np.testing.assert_array_equal(state.params["w"], [4.0, 4.0])
    assert not carried(state).installed
    if not skipped:  # the rate that a restart finds is that of the loop
        assert recipe.apply(Event.TRAINING_START, state).learning_rate == 0.1
    state = at_epoch_end(state, 5, 8.0)
    with pytest.warns(UserWarning, match="before any model was averaged"):
        assert recipe.apply(Event.TRAINING_END, state) is state


# Models that are not finite.


@pytest.mark.parametrize("interval", ["1ep", "2ba"])
@pytest.mark.parametrize("bad", [[5], [7], [5, 6, 9]], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_both_forms_leave_out_the_same_models(interval, bad, value):
    """Weights by hand, w = epoch squared; those of some epochs are not finite.

    The rates are those of a run in which all were averaged.
    """
    recipe = SWA(0.5, 4, 0.0, update_interval=interval, skip_nonfinite=True)
    epochs, steps = 10, 4
    schedule = recipe.schedule(0.4, epochs, steps)
    tx = recipe.transform(epochs, steps)
    weights = [value if e in bad else float(e * e) for e in range(epochs)]
    opt_state = tx.init({"w": jnp.zeros(2)})
    state = fresh_state(epochs, learning_rate=0.4, steps_per_epoch=steps, num_updates=0)
    state = recipe.apply(Event.TRAINING_START, state)
    for epoch, weight in enumerate(weights):
        state = at_epoch_end(state, epoch, weight)
        for step in range(epoch * steps, (epoch + 1) * steps):
            np.testing.assert_allclose(
                state.learning_rate, schedule(step), rtol=4 * U, atol=4 * U
            )
            _, opt_state = tx.update({"w": jnp.zeros(2)}, opt_state, state.params)
            state = state._replace(num_updates=step + 1)
            state = recipe.apply(Event.BATCH_END, state)
        state = recipe.apply(Event.EPOCH_END, state)
        assert carried(state).average.num_averaged == opt_state.num_averaged
    sampled = dict.fromkeys(range(5, 10), 1)
    if interval == "2ba":  # from the end of epoch 5 on: its last batch, then two each
        sampled = {e: 1 if e == 5 else 2 for e in sampled}
    good = {e: n for e, n in sampled.items() if e not in bad}
    mean = sum(n * e * e for e, n in good.items()) / sum(good.values())
    assert opt_state.num_averaged == sum(good.values())
    for average in (
        swa_jax.swa_params(opt_state, state.params),
        recipe.apply(Event.TRAINING_END, state).params,
    ):
        np.testing.assert_allclose(average["w"], [mean, mean], rtol=16 * U)


def test_without_the_guard_a_model_that_is_not_finite_enters():
    state = run(SWA(), [1.0] * 9 + [math.nan], fresh_state())
    assert np.isnan(state.params["w"]).all()


def test_the_logger_tells_of_a_model_that_was_left_out():
    recipe = SWA(0.5, skip_nonfinite=True)
    logged: list[dict[str, float]] = []
    state = recipe.apply(Event.TRAINING_START, fresh_state(4))
    for epoch, weight in ((2, 3.0), (3, math.nan)):
        state = at_epoch_end(state, epoch, weight)
        state = recipe.apply(Event.EPOCH_END, state, logged.append)
    assert [line["swa/num_averaged"] for line in logged] == [1.0, 1.0]
    assert math.isnan(logged[1]["swa/distance"])


# Purity.


def network_state() -> tuple[TrainingState, dict[str, Any]]:
    """A state with statistics, and what TRAINING_END needs for them."""

    def batch_stats_fn(params, batch_stats, batch):
        x = batch * params["w"][None]
        return {
            "mean": 0.9 * batch_stats["mean"] + 0.1 * x.mean(0),
            "var": 0.9 * batch_stats["var"] + 0.1 * x.var(0),
        }

    batches = [jnp.arange(8.0).reshape(4, 2), jnp.arange(6.0).reshape(3, 2)]
    state = fresh_state(batch_stats={"mean": jnp.ones(2), "var": jnp.ones(2)})
    return state, {"batch_stats_fn": batch_stats_fn, "train_batches": lambda: batches}


def test_apply_is_pure():
    """Same input, same output, input untouched: at every event, in any order."""
    recipe = SWA(0.5, 3, 0.01)
    state, extras = network_state()
    seen = []
    for event, epoch in [
        (Event.TRAINING_START, 0),
        (Event.EPOCH_END, 5),
        (Event.EPOCH_END, 6),
        (Event.TRAINING_END, 9),
    ]:
        state = at_epoch_end(state, epoch, float(epoch))
        before = jax.tree.map(np.array, state)
        first = recipe.apply(event, state, **extras)
        again = recipe.apply(event, state, **extras)
        chex.assert_trees_all_equal(first, again)
        chex.assert_trees_all_equal(state, before)  # alive, and with the same values
        seen.append((event, epoch, state, first))
        state = first
    for event, _, old, expected in reversed(seen):
        chex.assert_trees_all_equal(recipe.apply(event, old, **extras), expected)


def test_apply_changes_nothing_where_match_declines():
    state = SWA().apply(Event.TRAINING_START, fresh_state())
    for event in (Event.EPOCH_START, Event.BATCH_START, Event.BATCH_END):
        assert SWA().apply(event, state) is state
    assert SWA().apply(Event.EPOCH_END, state._replace(epoch=7)).swa is state.swa


@pytest.mark.parametrize("end", [None, "0.7dur"])
def test_state_is_a_pytree_of_arrays_that_resumes_in_mid_anneal(end):
    """Weights and `swa` are saved after every epoch, and nothing else.

    The loop starts anew each time, at the base's first rate, and ends with the same
    bits: rates, weights, average.
    """
    recipe = SWA(0.3, 4, 0.01, swa_end=end)

    def train(restarts: bool) -> tuple[list[float], TrainingState]:
        state = recipe.apply(Event.TRAINING_START, fresh_state())
        rates = []
        for epoch in range(10):
            if restarts:
                saved = flax.serialization.to_bytes((state.params, state.swa))
                blank = recipe.apply(Event.TRAINING_START, fresh_state())
                params, swa = flax.serialization.from_bytes(
                    (blank.params, blank.swa), saved
                )
                again = fresh_state(params=params, swa=swa)
                state = recipe.apply(Event.TRAINING_START, again)
            rates.append(float(state.learning_rate))
            moved = {"w": state.params["w"] + state.learning_rate * (epoch + 1)}
            state = state._replace(epoch=epoch, params=moved)
            if recipe.match(Event.EPOCH_END, state):
                state = recipe.apply(Event.EPOCH_END, state)
        return rates, recipe.apply(Event.TRAINING_END, state)

    rates, uninterrupted = train(restarts=False)
    assert len(set(rates)) == 5  # 0.1, three on the way, 0.01
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(uninterrupted.swa))
    again, restarted = train(restarts=True)
    assert again == rates
    chex.assert_trees_all_equal(restarted, uninterrupted)


def test_state_survives_orbax(tmp_path):
    """Restored into what TRAINING_START creates, also after models were averaged."""
    recipe = SWA(0.5, 3, 0.01)
    blank = recipe.apply(Event.TRAINING_START, fresh_state())
    state = recipe.apply(Event.EPOCH_END, at_epoch_end(blank, 5, 2.0))
    state = recipe.apply(Event.EPOCH_END, at_epoch_end(state, 7, 4.0))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "swa", state.swa)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "swa", blank.swa)
    assert type(back) is type(state.swa)
    chex.assert_trees_all_equal(back, state.swa)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, state.swa)
    restored = recipe.apply(Event.TRAINING_START, fresh_state(swa=back))
    assert restored.learning_rate == state.learning_rate
    with pytest.raises(ValueError, match="epoch 7 already"):
        recipe.apply(Event.EPOCH_END, restored._replace(epoch=7))
    whole = at_epoch_end(restored, 8, 9.0)
    whole = recipe.apply(Event.TRAINING_END, recipe.apply(Event.EPOCH_END, whole))
    np.testing.assert_array_equal(whole.params["w"], [5.0, 5.0])  # of 2, 4, 9


def test_types_and_compilations_are_stable(caplog):
    """One structure from the start on, and one compilation for all epochs."""
    recipe = SWA(0.1, 20, 0.01)
    state = fresh_state(
        40, params={"w": jnp.zeros((3, 5))}, learning_rate=jnp.array(0.1)
    )
    state = recipe.apply(Event.TRAINING_START, state)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state.swa)
    compiled = []  # after each epoch
    with jax.log_compiles():
        for epoch in range(4, 40):
            state = recipe.apply(Event.EPOCH_END, state._replace(epoch=epoch))
            assert types == jax.tree.map(
                lambda x: (x.shape, x.dtype, x.weak_type), state.swa
            )
            messages = [r.getMessage() for r in caplog.records]
            compiled.append(sum("Compiling" in message for message in messages))
    assert compiled[0] > 0  # so this is how jax reports it
    assert compiled[-1] == compiled[1]


def test_sharded_parameters_keep_their_place():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    w = jax.device_put(jnp.arange(16.0), sharding)
    state = SWA().apply(Event.TRAINING_START, fresh_state(params=w))
    for epoch in (8, 9):
        state = SWA().apply(Event.EPOCH_END, state._replace(epoch=epoch, params=w))
    state = SWA().apply(Event.TRAINING_END, state)
    for leaf in (state.params, carried(state).average.avg_params):
        assert leaf.sharding == sharding
    np.testing.assert_array_equal(state.params, w)


# The end of training.


def test_statistics_are_those_of_the_averaged_weights():
    state, extras = network_state()
    weights = [float(n) for n in range(1, 11)]
    state = SWA().apply(Event.TRAINING_START, state)
    for epoch, weight in enumerate(weights):
        state = SWA().apply(Event.EPOCH_END, at_epoch_end(state, epoch, weight))
    final = SWA().apply(Event.TRAINING_END, state, **extras)
    rows = 9.5 * np.concatenate([np.asarray(b) for b in extras["train_batches"]()])
    np.testing.assert_allclose(final.batch_stats["mean"], rows.mean(0), rtol=8 * U)
    np.testing.assert_allclose(final.batch_stats["var"], rows.var(0), rtol=32 * U)


@pytest.mark.parametrize("batch_stats", [{}, None])
def test_a_model_without_statistics_needs_no_data(batch_stats):
    state = run(SWA(), [1.0] * 10, fresh_state(batch_stats=batch_stats))
    np.testing.assert_array_equal(state.params["w"], [1.0, 1.0])


@pytest.mark.parametrize("missing", ["batch_stats_fn", "train_batches"])
def test_statistics_that_cannot_be_recomputed_are_an_error(missing):
    state, extras = network_state()
    state = SWA().apply(Event.TRAINING_START, state)
    state = SWA().apply(Event.EPOCH_END, at_epoch_end(state, 9, 3.0))
    with pytest.raises(ValueError, match=f"{missing} must be a function.*got None"):
        SWA().apply(Event.TRAINING_END, state, **{**extras, missing: None})
    final = SWA().apply(Event.TRAINING_END, state, **extras)  # nothing was lost
    np.testing.assert_array_equal(final.params["w"], [3.0, 3.0])


def test_training_that_ended_before_averaging_keeps_its_weights():
    state = SWA().apply(Event.TRAINING_START, fresh_state())
    state = at_epoch_end(state, 3, 5.0)
    with pytest.warns(UserWarning, match="before any model was averaged"):
        assert SWA().apply(Event.TRAINING_END, state) is state


# The logger.


def test_logger_receives_the_methods_own_metrics():
    recipe = SWA(0.5, 2, 0.0, anneal_strategy="linear")
    state = recipe.apply(Event.TRAINING_START, fresh_state(4, learning_rate=0.5))
    logged: list[dict[str, float]] = []
    for epoch, weight in enumerate([0.0, 0.0, 3.0, 6.0]):
        state = at_epoch_end(state, epoch, weight)
        state = recipe.apply(Event.EPOCH_END, state, logged.append)
    assert logged == [
        {"swa/num_averaged": 1.0, "swa/learning_rate": 0.25, "swa/distance": 0.0},
        # The mean is 4.5 in both coordinates, the weights are 6.
        {
            "swa/num_averaged": 2.0,
            "swa/learning_rate": 0.0,
            "swa/distance": pytest.approx(1.5 * math.sqrt(2), rel=4 * U),
        },
    ]
    assert all(type(v) is float for line in logged for v in line.values())


# Under JAX's strict settings.


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("rate", [float, np.float32, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_apply_under_strict_settings(request, bits, rate, dtype):
    """No implicit promotion, no implicit transfer: the same rates and average."""
    if bits == 64:
        request.getfixturevalue("enable_x64")
    elif dtype == jnp.float64:
        pytest.skip("float64 needs 64-bit types")
    recipe = SWA("1ep", 2, rate(0.0625), anneal_strategy="linear", swa_end="4ep")
    weights = [jnp.full(2, 2.0**n, dtype) for n in range(4)]
    state = fresh_state(5, params={"w": weights[0]}, learning_rate=rate(0.5))
    logged: list[dict[str, float]] = []
    rates = []
    strict = jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow")
    with strict[0], strict[1]:
        state = recipe.apply(Event.TRAINING_START, state)
        for epoch, w in enumerate(weights):
            state = state._replace(epoch=epoch, params={"w": w})
            state = recipe.apply(Event.EPOCH_END, state, logged.append)
            rates.append(state.learning_rate)
        state = recipe.apply(Event.TRAINING_END, state)
    np.testing.assert_array_equal(rates, [0.28125, 0.0625, 0.0625, 0.0625])
    np.testing.assert_array_equal(state.params["w"].astype(float), [3.75, 3.75])
    assert state.params["w"].dtype == dtype
    distances = [0, 0.5, 5 / 3, 4.25]  # of 2**n from the mean of 1, 2, ..., 2**n
    np.testing.assert_allclose(
        [line["swa/distance"] for line in logged],
        np.sqrt(2) * np.array(distances),
        rtol=4 * U,
    )


# Things a user might do wrong.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"swa_start": 0.0}, ValueError, r"swa_start must be in \(0, 1\), got 0.0"),
        ({"swa_start": 1.0}, ValueError, "swa_start must be in"),
        ({"swa_start": 8}, ValueError, 'as in "8ep"'),
        ({"swa_start": -0.1}, ValueError, "swa_start must be in"),
        ({"swa_start": math.nan}, ValueError, "swa_start must be in"),
        ({"swa_start": None}, TypeError, "swa_start must be a fraction"),
        ({"swa_start": True}, TypeError, "swa_start must be a fraction"),
        ({"swa_start": "8"}, ValueError, "swa_start must be a time string"),
        ({"swa_start": "8 epochs"}, ValueError, "swa_start must be a time string"),
        ({"swa_start": "-1ep"}, ValueError, "swa_start must be a time string"),
        ({"swa_start": "0ep"}, ValueError, "swa_start must be later"),
        ({"swa_start": "0.0dur"}, ValueError, "swa_start must be later"),
        ({"swa_start": "1.5ep"}, ValueError, "whole number of epochs"),
        ({"swa_start": "1.2dur"}, ValueError, 'at most "1dur"'),
        ({"anneal_epochs": 0}, ValueError, "anneal_epochs must be at least 1, got 0"),
        ({"anneal_epochs": -3}, ValueError, "anneal_epochs must be at least 1"),
        ({"anneal_epochs": 2.5}, TypeError, "anneal_epochs must be an integer"),
        ({"anneal_epochs": "5ep"}, TypeError, "anneal_epochs must be an integer"),
        ({"swa_lr": -0.1}, ValueError, "swa_lr must be finite and not negative"),
        ({"swa_lr": math.inf}, ValueError, "swa_lr must be finite"),
        ({"swa_lr": "0.1"}, TypeError, "swa_lr must be a learning rate or None"),
        ({"anneal_strategy": "cosine"}, ValueError, "anneal_strategy must be one of"),
        ({"anneal_strategy": None}, ValueError, "anneal_strategy must be one of"),
        ({"swa_lr": np.ones(2)}, TypeError, "swa_lr must be a learning rate"),
        ({"swa_start": np.array([0.8])}, TypeError, "swa_start must be a fraction"),
        ({"swa_end": 0.97}, TypeError, "swa_end must be a time string"),
        ({"swa_end": "end"}, ValueError, "swa_end must be a time string"),
        ({"update_interval": 1}, TypeError, "update_interval must be a time string"),
        ({"update_interval": "0ep"}, ValueError, "at least one epoch or batch"),
        ({"update_interval": "0.1dur"}, ValueError, "at least one epoch or batch"),
        ({"anneal_epochs": True}, TypeError, "anneal_epochs must be an integer"),
        ({"skip_nonfinite": "yes"}, TypeError, "skip_nonfinite must be True or False"),
    ],
    ids=str,
)
def test_refused_hyperparameters(arguments, error, message):
    with pytest.raises(error, match=message):
        SWA(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"swa_start": "11ep"},
        {"swa_start": "31ba", "update_interval": "1ba"},
        {"swa_start": "8ep", "swa_end": "7ep"},
        {"swa_start": 0.8, "swa_end": "0.8dur"},  # from the 9th on, until the 8th
        {"swa_end": "11ep"},
    ],
    ids=str,
)
def test_an_empty_window_is_found_at_the_start(arguments):
    recipe = SWA(**arguments)
    state = fresh_state(steps_per_epoch=3)
    message = "averaging window is empty"
    with pytest.raises(ValueError, match=message):
        recipe.apply(Event.TRAINING_START, state)
    with pytest.raises(ValueError, match=message):
        recipe.transform(10, 3)
    with pytest.raises(ValueError, match=message):
        recipe.schedule(0.1, 10, 3)


@pytest.mark.parametrize("name", ["num_epochs", "steps_per_epoch"])
@pytest.mark.parametrize("value", [0, -1, 2.0, None, "3"])
@pytest.mark.parametrize("method", ["transform", "schedule"])
def test_refused_lengths(name, value, method):
    arguments = {"num_epochs": 10, "steps_per_epoch": 3, name: value}
    if method == "schedule":
        arguments["base"] = 0.1
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        getattr(SWA(), method)(**arguments)


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        (SWA(), {"epoch": 10}, "epochs count from 0"),
        (SWA(), {"epoch": -1}, "state.epoch must be at least 0"),
        (SWA(), {"num_epochs": 0}, "num_epochs must be at least 1"),
        (SWA("500ba"), {"epoch": 9}, "steps_per_epoch is needed.*swa_start='500ba'"),
        (SWA(update_interval="5ba"), {}, "steps_per_epoch is needed.*'5ba'"),
    ],
    ids=str,
)
def test_refused_states(recipe, fields, message):
    with pytest.raises(ValueError, match=message):
        recipe.match(Event.EPOCH_END, fresh_state(**fields))


def test_epochs_from_1_are_found_before_the_last_one_is_trained():
    with pytest.raises(ValueError, match=r"state.epoch must be below .*got 10"):
        SWA().match(Event.EPOCH_START, fresh_state(epoch=10))


def test_an_epoch_is_averaged_once():
    state = SWA(0.5).apply(Event.TRAINING_START, fresh_state(epoch=5))
    state = SWA(0.5).apply(Event.EPOCH_END, state)
    with pytest.raises(ValueError, match=r"taken up epoch 5 already.* applied twice"):
        SWA(0.5).apply(Event.EPOCH_END, state)
    state = SWA(0.5).apply(Event.EPOCH_END, state._replace(epoch=6))
    assert int(carried(state).average.num_averaged) == 2


def test_an_epoch_is_averaged_once_also_after_one_was_missed():
    """So the number of averaged models does not tell: 2 after three epochs."""
    state = SWA(0.5).apply(Event.TRAINING_START, fresh_state())
    for epoch in (5, 7):
        state = SWA(0.5).apply(
            Event.EPOCH_END, at_epoch_end(state, epoch, float(epoch))
        )
    for epoch in (7, 6, 5):
        with pytest.raises(ValueError, match=f"epoch 7 already, at the end.*{epoch}:"):
            SWA(0.5).apply(Event.EPOCH_END, state._replace(epoch=epoch))
    state = SWA(0.5).apply(Event.EPOCH_END, at_epoch_end(state, 8, 9.0))
    final = SWA(0.5).apply(Event.TRAINING_END, state)
    np.testing.assert_array_equal(final.params["w"], [7.0, 7.0])  # of 5, 7, 9


def test_a_batch_is_averaged_once():
    recipe = SWA("4ba", update_interval="2ba")
    state = fresh_state(2, steps_per_epoch=5, num_updates=4)
    state = recipe.apply(Event.TRAINING_START, state)
    state = recipe.apply(Event.BATCH_END, state)
    with pytest.raises(ValueError, match=r"batch 4 already.*once an optimizer update"):
        recipe.apply(Event.BATCH_END, state)


def test_the_average_of_a_shorter_run_is_not_continued():
    """Of ten epochs from the 9th on, of twelve from the 10th on: 9 is in it."""
    state = run(SWA(), [1.0] * 10, fresh_state())
    state = state._replace(num_epochs=12, epoch=10)
    for event in (Event.TRAINING_START, Event.EPOCH_END):
        with pytest.raises(ValueError, match=r"from epoch 8 on, .*with epoch 9:"):
            SWA().apply(event, state)


@pytest.mark.parametrize(
    ("rate", "error"),
    [
        (None, TypeError),
        ("0.1", TypeError),
        (np.ones(2), TypeError),
        (math.nan, ValueError),
        (-1.0, ValueError),
    ],
)
def test_refused_learning_rates_of_the_loop(rate, error):
    state = SWA().apply(Event.TRAINING_START, fresh_state(epoch=9))
    with pytest.raises(error, match=r"state.learning_rate must be"):
        SWA().apply(Event.EPOCH_END, state._replace(learning_rate=rate))


@pytest.mark.parametrize("event", [Event.TRAINING_START, Event.EPOCH_END])
def test_another_state_than_the_methods_own_is_refused(event):
    state = fresh_state(epoch=9, swa=swa_jax.init_average({"w": jnp.zeros(2)}))
    with pytest.raises(TypeError, match=r"state.swa must be what apply .*SWAState"):
        SWA().apply(event, state)


def test_debugging_for_nan_finds_none():
    with jax.debug_nans(True):
        state = run(SWA(0.5, 2, 0.1), [float(n) for n in range(10)], fresh_state())
    np.testing.assert_array_equal(state.params["w"], [7.0, 7.0])


def test_weights_and_rate_may_live_on_other_devices_than_the_average():
    here, there = jax.devices()[:2]
    logged: list[dict[str, float]] = []
    state = SWA(0.5).apply(Event.TRAINING_START, fresh_state())
    for epoch in range(5, 10):
        state = at_epoch_end(state, epoch, float(epoch))._replace(
            learning_rate=jax.device_put(0.1, here)
        )
        state = state._replace(params=jax.device_put(state.params, there))
        state = SWA(0.5).apply(Event.EPOCH_END, state, logged.append)
    assert logged[-1]["swa/distance"] == pytest.approx(2 * math.sqrt(2), rel=4 * U)


def test_batches_need_their_count():
    recipe = SWA(update_interval="5ba")
    state = fresh_state(steps_per_epoch=10)
    with pytest.raises(ValueError, match="num_updates is needed"):
        recipe.match(Event.BATCH_END, state)
    with pytest.raises(ValueError, match="at most num_epochs"):
        recipe.match(Event.BATCH_END, state._replace(num_updates=101))


TOO_LONG = [(2**31, 1), (1, 2**31), (2**16, 2**15), (46341, 46341), (2**40, 2**40)]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("epochs", "steps"), TOO_LONG)
def test_more_updates_than_int32_counts_are_refused(request, bits, epochs, steps):
    if bits == 64:
        request.getfixturevalue("enable_x64")
    for make in (SWA().transform, lambda *a: SWA().schedule(0.1, *a)):
        with pytest.raises(ValueError, match=r"num_epochs|steps_per_epoch.*2147483647"):
            make(epochs, steps)
    state = fresh_state(epochs, steps_per_epoch=steps)
    with pytest.raises(ValueError, match="2147483647"):
        SWA(update_interval="1ba").apply(Event.TRAINING_START, state)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("interval", ["1ep", "1ba", "9ep", "3000000000ba"])
def test_the_longest_run(request, bits, interval):
    """2**31 - 1 updates, an anneal that outlasts them, an interval beyond int32."""
    if bits == 64:
        request.getfixturevalue("enable_x64")
    epochs, steps = 1, 2**31 - 1
    if interval[-2:] == "ep":
        epochs, steps = steps, epochs
    recipe = SWA(
        0.5, 2**31 - 1, 0.0, anneal_strategy="linear", update_interval=interval
    )
    recipe.transform(epochs, steps)
    schedule = recipe.schedule(0.5, epochs, steps)
    period = int(interval[:-2])
    # Counted from 0, epoch int(0.5 N) is averaged first; of one, the only one.
    first = epochs // 2 + 1 if epochs > 1 else steps
    for step in (0, first - 1, first, 2**31 - 2):
        number = max(0, (step - first) // period + 1)
        expected = 0.5 * (1 - min(1.0, number * period / ((2**31 - 1) * steps)))
        np.testing.assert_allclose(schedule(step), expected, rtol=4 * U)
    state = fresh_state(
        epochs, steps_per_epoch=steps, num_updates=first, epoch=(first - 1) // steps
    )
    state = recipe.apply(Event.TRAINING_START, state)
    event = Event.EPOCH_END if interval[-2:] == "ep" else Event.BATCH_END
    state = recipe.apply(event, state._replace(learning_rate=0.5))
    expected = 0.5 * (1 - min(1.0, period / ((2**31 - 1) * steps)))
    np.testing.assert_allclose(state.learning_rate, expected, rtol=4 * U)


@pytest.mark.parametrize("method", ["match", "apply"])
def test_swapped_arguments(method):
    state = fresh_state(params={"w": jnp.arange(1000.0)})
    with pytest.raises(TypeError, match=r"got <Event.*the event comes first") as error:
        getattr(SWA(), method)(state, Event.EPOCH_END)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("state", [None, {"epoch": 3}, jnp.zeros(1000), "state"])
@pytest.mark.parametrize("method", ["match", "apply"])
def test_another_state_than_a_training_state(method, state):
    message = r"state must be a swa_jax.TrainingState, got .*lacks epoch"
    with pytest.raises(TypeError, match=message) as error:
        getattr(SWA(), method)(Event.EPOCH_END, state)
    assert len(str(error.value)) < 300


def test_a_training_state_may_carry_more():
    state = run(SWA(), [1.0] * 10, More(*fresh_state(), opt_state="mine"))
    assert type(assert_type(state, More)) is More
    assert state.opt_state == "mine"


class More(NamedTuple):
    """A training state of one's own."""

    epoch: int
    num_epochs: int
    params: Any
    batch_stats: Any
    learning_rate: Rate
    swa: RecipeState | None
    num_updates: int | None
    steps_per_epoch: int | None
    opt_state: str


@pytest.mark.parametrize("event", [Event.TRAINING_START, Event.EPOCH_START])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_batches", [jnp.arange(1000.0)] * 50),
        ("train_batches", jnp.zeros((100, 100))),
        ("batch_stats_fn", {"mean": jnp.zeros(1000)}),
        ("logger", []),
    ],
)
def test_what_is_no_function_is_found_at_the_start(event, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a function or None") as error:
        SWA().apply(event, fresh_state(), **{name: value})
    assert len(str(error.value)) < 300


def test_train_batches_that_returns_a_function():
    state, extras = network_state()
    state = SWA().apply(Event.TRAINING_START, state)
    state = SWA().apply(Event.EPOCH_END, at_epoch_end(state, 9, 3.0))
    batches = extras["train_batches"]
    with pytest.raises(TypeError, match=r"train_batches must return batches.*function"):
        SWA().apply(
            Event.TRAINING_END, state, **{**extras, "train_batches": lambda: batches}
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3.0}, "state.epoch must be an integer known outside jit, got 3.0"),
        ({"epoch": True}, "state.epoch must be an integer"),
        ({"num_epochs": "10"}, "num_epochs must be an integer .*got '10' of type str"),
        ({"num_epochs": 10.0}, "num_epochs must be an integer"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch must be an integer"),
        ({"epoch": np.arange(99)}, r"state.epoch .*got an array of shape \(99,\)"),
        (
            {"learning_rate": optax.constant_schedule(0.1)},
            "state.learning_rate must be a learning rate.*value at this step",
        ),
    ],
)
def test_numbers_of_another_kind(fields, message):
    with pytest.raises(TypeError, match=message):
        SWA().apply(Event.EPOCH_START, fresh_state(**fields))


@pytest.mark.parametrize(
    "use",
    [
        lambda recipe: optax.chain(optax.sgd(0.1), recipe),
        lambda recipe: optax.named_chain(("swa", recipe)),
        lambda recipe: optax.MultiSteps(recipe, 2).init({}),
        lambda recipe: optax.masked(recipe, True),
        lambda recipe: optax.with_extra_args_support(recipe),
        lambda recipe: recipe.init({}),
        lambda recipe: recipe.update({}, None),
    ],
)
def test_a_recipe_is_no_transformation(use):
    with pytest.raises(TypeError, match=r"SWA\(...\).transform\(num_epochs, steps_per"):
        use(SWA())


def test_a_recipe_stays_an_ordinary_object():
    assert not hasattr(SWA(), "init")
    assert getattr(SWA(), "update", None) is None
    recipe = SWA("2ep", 3, 0.1, skip_nonfinite=True)
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert dataclasses.replace(recipe, skip_nonfinite=False) == SWA("2ep", 3, 0.1)
    assert "init" not in {field.name for field in dataclasses.fields(recipe)}


def test_batches_are_averaged_inside_jit_as_outside():
    recipe = SWA("1ep", 1, 0.0, update_interval="2ba", anneal_strategy="linear")
    state = fresh_state(4, steps_per_epoch=4, num_updates=0)
    swa = carried(recipe.apply(Event.TRAINING_START, state))
    for updates in (4, 6):
        w = jnp.full(2, float(updates))
        here = state._replace(num_updates=updates, params={"w": w}, learning_rate=0.5)

        def average(swa, here=here):
            new = recipe.apply(Event.BATCH_END, here._replace(swa=swa))
            return new.swa, new.learning_rate

        expected = average(swa)
        swa, rate = jax.jit(average)(swa)
        chex.assert_trees_all_equal((swa, rate), expected)
    assert (int(swa.first_tick), int(swa.last_tick), float(rate)) == (4, 6, 0.0)
    np.testing.assert_array_equal(swa.average.avg_params["w"], [5.0, 5.0])


def test_epochs_inside_jit_are_refused():
    with pytest.raises(
        TypeError, match=r"state.epoch must be an integer known outside"
    ):
        jax.jit(lambda e: SWA().match(Event.EPOCH_END, fresh_state(epoch=e)))(3)


@pytest.mark.parametrize("event", ["epoch", None, 3])
def test_unknown_events(event):
    with pytest.raises(ValueError, match=r"event must be a swa_jax.Event \(TRAINING_"):
        SWA().match(event, fresh_state())


@pytest.mark.parametrize("event", [Event.EPOCH_END, Event.TRAINING_END])
def test_apply_without_a_start(event):
    with pytest.raises(ValueError, match="apply that first"):
        SWA().apply(event, fresh_state(epoch=9))


def test_another_model_than_at_the_start_loses_nothing():
    state = SWA().apply(Event.TRAINING_START, fresh_state(epoch=9))
    with pytest.raises(ValueError, match="has shape"):
        SWA().apply(Event.EPOCH_END, state._replace(params={"w": jnp.zeros(3)}))
    state = SWA().apply(Event.EPOCH_END, state)
    assert swa_jax.swa_state(state.swa).num_averaged == 1
