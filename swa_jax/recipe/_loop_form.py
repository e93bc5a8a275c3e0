"""The method in a training loop of events: pure functions of a ``TrainingState``."""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from swa_jax._loop import averaged_with, init_average
from swa_jax._placement import is_traced
from swa_jax._validate import check_rate, known
from swa_jax.recipe._ends import finish, install
from swa_jax.recipe._metrics import metrics
from swa_jax.recipe._settings import Settings
from swa_jax.recipe._state import (
    AnyTrainingState,
    Event,
    RecipeState,
    StateT,
    check_arguments,
    check_carried,
    check_functions,
    check_new,
    check_window,
    current_tick,
    first_or,
    tick_event,
)
from swa_jax.recipe._timing import Length
from swa_jax.schedules import scalar_arithmetic
from swa_jax.typing import BatchStatsFn, Logger, PyTree


def match(settings: Settings, event: Event | str, state: AnyTrainingState) -> bool:
    """See ``SWA.match``."""
    event = check_arguments(event, state)
    when = settings.window(Length.of(state.num_epochs, state.steps_per_epoch))
    if event in (Event.TRAINING_START, Event.TRAINING_END):
        return True
    if when.unit == "ep":
        current_tick(when, state)  # a wrong epoch is found as early as may be
    if event is not tick_event(when):
        return False
    tick = current_tick(when, state)
    return when.when.samples(tick) or when.ends_early(tick)


def apply(
    settings: Settings,
    event: Event | str,
    state: StateT,
    logger: Logger | None,
    batch_stats_fn: BatchStatsFn | None,
    train_batches: Callable[[], Iterable[PyTree]] | None,
) -> StateT:
    """See ``SWA.apply``."""
    event = check_arguments(event, state)
    check_functions(
        logger=logger, batch_stats_fn=batch_stats_fn, train_batches=train_batches
    )
    if callable(state.learning_rate):  # else it is looked at when it is needed
        check_rate("state.learning_rate", state.learning_rate)
    if not match(settings, event, state):
        return state
    check_carried(state.swa)
    length = Length.of(state.num_epochs, state.steps_per_epoch)
    if event is Event.TRAINING_START:
        return _start(settings, state, length)
    if state.swa is None:
        raise ValueError(
            f"apply: state.swa is None at {event.name}: the average is created at "
            "Event.TRAINING_START; apply that first, and keep the state it returns"
        )
    if event is Event.TRAINING_END:
        return finish(state, batch_stats_fn, train_batches)
    when = settings.window(length)
    tick = current_tick(when, state)
    check_new(when, tick, state.swa)
    if when.when.samples(tick):
        state = _average(settings, state, length, tick)
        if logger is not None:
            logger(metrics(state))
    return install(state, tick) if when.ends_early(tick) else state


@scalar_arithmetic()
def _start(settings: Settings, state: StateT, length: Length) -> StateT:
    """Creates the average, or takes up the one that a checkpoint brought back."""
    when = settings.window(length)
    if state.swa is None:
        new = RecipeState(
            average=init_average(state.params),
            initial_lr=jnp.zeros([], jnp.result_type(float)),
            first_tick=jnp.zeros([], jnp.int32),
            last_tick=jnp.zeros([], jnp.int32),
            installed=jnp.zeros([], bool),
        )
        return state._replace(swa=new)
    check_window(when, state.swa)
    if not int(known(state.swa.first_tick)):
        return state
    # The rate is the method's by now, and may not have been saved with it.
    number = when.when.position(int(known(state.swa.last_tick)))
    rate = settings.annealed(state.swa.initial_lr, number, length)
    return state._replace(learning_rate=rate)


@scalar_arithmetic()
def _average(settings: Settings, state: StateT, length: Length, tick: int) -> StateT:
    """Averages the weights, then moves the learning rate."""
    before: RecipeState = state.swa  # type: ignore[assignment]
    rate = state.learning_rate
    check_rate("state.learning_rate", rate)
    if not is_traced(rate):
        rate = np.asarray(known(rate))  # it may meet the average of any device
    lr0 = before.initial_lr
    lr0 = jnp.where(before.first_tick == 0, jnp.asarray(rate, lr0.dtype), lr0)
    after = RecipeState(
        average=averaged_with(
            before.average, state.params, skip_nonfinite=bool(settings.skip_nonfinite)
        ),
        initial_lr=lr0,
        first_tick=first_or(before.first_tick, tick),
        last_tick=jnp.int32(tick),
        installed=before.installed,
    )
    number = settings.window(length).when.position(tick)
    return state._replace(
        learning_rate=settings.annealed(lr0, number, length), swa=after
    )
