"""The published method from its own hyperparameters: ``SWA(swa_start, anneal_epochs)``.

The same method in two forms. Inside optax, ``transform`` and ``schedule`` go into the
optimizer. In a training loop of events, ``match`` says whether the method acts on an
event and ``apply`` does it, as a pure function of a ``TrainingState``. Both average the
same models and give the same learning rates, because both ask one ``Window`` when to
sample and one anneal for the rate.
"""

import dataclasses
import enum
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax._reading import swa_params
from swa_jax.averaging import SWAState, averaged_with, init_average
from swa_jax.batch_stats import BatchStatsFn, PyTree, recompute_batch_stats
from swa_jax.placement import beside, is_traced
from swa_jax.schedules import (
    Strategy,
    as_schedule,
    as_step,
    check_rate,
    check_strategy,
    swa_schedule,
)
from swa_jax.timing import Length, Window, check_count, parse_time, window
from swa_jax.transform import swa

Logger = Callable[[dict[str, float]], object]


class Event(enum.StrEnum):
    """Moments of a training loop, in the order in which they come."""

    TRAINING_START = "training_start"
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"
    BATCH_END = "batch_end"
    EPOCH_END = "epoch_end"
    TRAINING_END = "training_end"


class RecipeState(NamedTuple):
    """What ``SWA.apply`` carries from event to event: arrays only.

    Attributes:
      average: the average, an ``SWAState``.
      initial_lr: float scalar, the learning rate that the anneal starts from: the one
        at the first averaged model, 0 before.
      installed: bool scalar, whether training went on from the average (``swa_end``).
    """

    average: SWAState
    initial_lr: jax.Array  # float32, shape ()
    installed: jax.Array  # bool, shape ()


class TrainingState(NamedTuple):
    """What a training loop shows to ``SWA.match`` and ``SWA.apply``.

    Attributes:
      epoch: int, the current epoch, counted from 0: ``num_epochs - 1`` in the last.
      num_epochs: int, the epochs of the whole run.
      params: pytree of arrays, the weights.
      batch_stats: pytree of arrays, running statistics of normalisation; empty (``{}``
        or ``None``) for a model that has none.
      learning_rate: float scalar, the rate that the optimizer uses now.
      swa: pytree, the method's own state; ``None`` before ``TRAINING_START``.
      num_updates: int, optimizer updates made so far in all epochs. Needed where
        models are averaged every so many batches.
      steps_per_epoch: int, batches in an epoch. Needed for times given in batches.
    """

    epoch: int
    num_epochs: int
    params: PyTree
    batch_stats: PyTree
    learning_rate: jax.typing.ArrayLike
    swa: RecipeState | None = None
    num_updates: int | None = None
    steps_per_epoch: int | None = None


@dataclasses.dataclass(frozen=True)
class SWA:
    """Stochastic Weight Averaging by its published hyperparameters.

    Train for N epochs, counted from 0, and let ``s = int(swa_start * N)``. The weights
    at the ends of epochs s, s + 1, ..., N - 1 are averaged. The learning rate follows
    its own schedule through epoch s, where it ends at ``lr0``; in epoch s + k it is ::

        lr0 * (1 - a(x)) + swa_lr * a(x),   x = min(1, k / anneal_epochs)

    with ``a(x) = (1 - cos(pi * x)) / 2`` or, for ``"linear"``, ``a(x) = x``.

    Use either form. Inside optax::

        recipe = swa_jax.SWA(swa_lr=0.05)
        tx = optax.chain(
            optax.sgd(recipe.schedule(base, num_epochs, steps_per_epoch)),
            recipe.transform(num_epochs, steps_per_epoch))

    Or in a loop, at each event::

        if recipe.match(event, state):
            state = recipe.apply(event, state)

    Args:
      swa_start: when averaging starts. A float in (0, 1) is a fraction of the epochs,
        by the rule above. A time string is the time that must have passed: ``"0.8dur"``
        of training, ``"8ep"`` epochs, ``"500ba"`` batches. Of ten epochs, 0.8 averages
        the ends of the 9th and 10th, ``"0.8dur"`` and ``"8ep"`` of the 8th as well.
      anneal_epochs: epochs from ``lr0`` to ``swa_lr``, >= 1.
      swa_lr: learning rate of the averaging phase, >= 0; ``None`` keeps ``lr0``.
      anneal_strategy: ``"cos"`` or ``"linear"``.
      swa_end: time string; the first model at or after it is the last that may be
        averaged, and ``apply`` lets training continue from the average, so that the
        statistics of normalisation follow in ordinary training steps, at the learning
        rate reached. Without it, or at ``"1dur"``, averaging ends with training.
      update_interval: time string in ``"ep"`` or ``"ba"``: average so often, and move
        the learning rate as often. ``anneal_epochs`` stays in epochs. In batches,
        ``match`` acts on ``BATCH_END`` and ``TrainingState`` must tell
        ``num_updates`` and ``steps_per_epoch``.

    Raises:
      TypeError: a value of the wrong kind.
      ValueError: ``swa_start`` outside (0, 1), ``anneal_epochs < 1``, a rate that is
        negative or not finite, an unknown strategy or time. An empty averaging window
        is found as soon as the length of training is known.

    Example:
      >>> import jax.numpy as jnp
      >>> recipe = SWA(swa_start=0.5, anneal_epochs=2, swa_lr=0.0)
      >>> state = TrainingState(epoch=0, num_epochs=4, params=jnp.zeros(()),
      ...                       batch_stats={}, learning_rate=1.0)
      >>> state = recipe.apply(Event.TRAINING_START, state)
      >>> for epoch in range(4):
      ...     state = state._replace(epoch=epoch, params=state.params + 1.0)
      ...     if recipe.match(Event.EPOCH_END, state):
      ...         state = recipe.apply(Event.EPOCH_END, state)
      >>> print(recipe.apply(Event.TRAINING_END, state).params)  # of 3 and 4
      3.5

    References:
      Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407. Hyperparameters:
      the first release of MosaicML's Composer, and ``torch.optim.swa_utils.SWALR``;
      ``swa_end`` and ``update_interval``: Composer's later releases.
    """

    swa_start: float | str = 0.8
    anneal_epochs: int = 10
    swa_lr: float | None = None
    _: dataclasses.KW_ONLY
    anneal_strategy: Strategy = "cos"
    swa_end: str | None = None
    update_interval: str = "1ep"

    def __post_init__(self) -> None:
        _check_start(self.swa_start)
        check_count("anneal_epochs", self.anneal_epochs)
        if self.swa_lr is not None:
            check_rate("swa_lr", self.swa_lr, " or None to hold the rate")
        check_strategy("anneal_strategy", self.anneal_strategy)
        if self.swa_end is not None:
            parse_time("swa_end", self.swa_end)
        interval = parse_time("update_interval", self.update_interval)
        if interval.unit == "dur" or not interval.value:
            raise ValueError(
                "update_interval must be at least one epoch or batch, such as "
                f'"1ep" or "100ba", got {self.update_interval!r}'
            )

    # Inside optax.

    def schedule(
        self, base: optax.ScalarOrSchedule, num_epochs: int, steps_per_epoch: int
    ) -> optax.Schedule:
        """The learning rate of the whole run.

        Args:
          base: learning rate, or schedule, up to the first averaged model.
          num_epochs: epochs of the whole run, >= 1.
          steps_per_epoch: optimizer updates in each, >= 1.

        Returns:
          A schedule from the 0-based step to a float scalar: ``base`` through the step
          whose weights are averaged first, then the anneal.

        Raises:
          ValueError: nothing would be averaged, or a number below 1.
          TypeError: a number that is no integer, or a ``base`` that is neither a rate
            nor a schedule.
        """
        length = _known_length(num_epochs, steps_per_epoch)
        when, size = self._window(length), self._tick_size(length)
        base = as_schedule(base)

        def schedule(step: Any) -> jax.Array:
            step = as_step(step)
            # Over `step` ended ticks, so many models have been averaged.
            last_sampled = jnp.minimum(step // size, when.last)
            num_averaged = (last_sampled - when.first) // when.period + 1
            lr0 = base(jnp.asarray(when.first * size - 1, step.dtype))
            annealed = self._annealed(lr0, num_averaged, length)
            return jnp.where(num_averaged > 0, annealed, base(step))

        return schedule

    def transform(
        self, num_epochs: int, steps_per_epoch: int
    ) -> optax.GradientTransformationExtraArgs:
        """Averages the same models inside optax: ``swa(...)`` in optimizer updates.

        Args:
          num_epochs: epochs of the whole run, >= 1.
          steps_per_epoch: optimizer updates in each, >= 1.

        Returns:
          The transformation, to stand last in ``optax.chain``. It never changes the
          weights: with ``swa_end``, continue from ``swa_params`` yourself.

        Raises:
          ValueError: nothing would be averaged, or a number below 1.
          TypeError: a number that is no integer.
        """
        length = _known_length(num_epochs, steps_per_epoch)
        when, size = self._window(length), self._tick_size(length)
        return swa(when.first * size, when.period * size, stop_step=when.last * size)

    # In a loop.

    def match(self, event: Event, state: TrainingState) -> bool:
        """Whether the method acts on ``event``.

        Args:
          event: what has just happened.
          state: the training state; only its numbers are read.

        Returns:
          True at ``TRAINING_START``, at ``TRAINING_END``, and at the end of every
          epoch (or batch, by ``update_interval``) whose weights are averaged or that
          ends the averaging.

        Raises:
          ValueError: an unknown event, an epoch outside the run, or nothing would be
            averaged in a run of this length.
        """
        event = _check_event(event)
        when = self._window(Length.of(state.num_epochs, state.steps_per_epoch))
        if event in (Event.TRAINING_START, Event.TRAINING_END):
            return True
        if when.unit == "ep":
            _tick(when, state)  # a wrong epoch is found as early as may be
        if event is not _tick_event(when):
            return False
        tick = _tick(when, state)
        return when.samples(tick) or when.ends_early(tick)

    def apply(
        self,
        event: Event,
        state: TrainingState,
        logger: Logger | None = None,
        *,
        batch_stats_fn: BatchStatsFn | None = None,
        train_batches: Callable[[], Iterable[PyTree]] | None = None,
    ) -> TrainingState:
        """Acts on ``event``: a pure function, which leaves ``state`` untouched.

        - ``TRAINING_START`` creates the average. A state that has one, from a
          checkpoint, keeps it, and the learning rate that the anneal had reached.
        - ``EPOCH_END`` (or ``BATCH_END``) averages the weights and moves the learning
          rate; at ``swa_end`` the averaged weights also replace the current ones.
        - ``TRAINING_END`` makes the averaged weights the state's ``params``, with
          statistics recomputed for them.

        All that is needed later is in ``TrainingState.swa``, a pytree: a state that is
        saved and restored goes on exactly.

        Args:
          event: what has just happened. One that ``match`` declines changes nothing.
          state: the training state.
          logger: called with a dict of floats after each averaged model:
            ``"swa/num_averaged"``, ``"swa/learning_rate"`` and ``"swa/distance"``, the
            Euclidean distance between average and weights.
          batch_stats_fn: one forward pass in training mode, see
            ``recompute_batch_stats``; needed at ``TRAINING_END`` if ``batch_stats``
            has any leaf.
          train_batches: function without arguments to the batches of one epoch of
            training data, for ``batch_stats_fn``.

        Returns:
          The new state.

        Raises:
          ValueError: no ``TRAINING_START`` before, ``params`` of another model than
            then, an epoch that was averaged already, a learning rate that is negative
            or not finite, statistics without the means to recompute them; see also
            ``match``.
          TypeError: ``state.swa`` is not what ``apply`` returned, or the learning rate
            is no number.
        """
        event = _check_event(event)
        if not self.match(event, state):
            return state
        _check_carried(state.swa)
        length = Length.of(state.num_epochs, state.steps_per_epoch)
        if event is Event.TRAINING_START:
            return self._start(state, length)
        if state.swa is None:
            raise ValueError(
                f"apply: state.swa is None at {event.name}: the average is created at "
                "Event.TRAINING_START; apply that first, and keep the state it returns"
            )
        if event is Event.TRAINING_END:
            return _finish(state, batch_stats_fn, train_batches)
        when = self._window(length)
        tick = _tick(when, state)
        if when.samples(tick):
            _check_new(when, tick, state.swa)
            state = self._average(state, length)
            if logger is not None:
                logger(_metrics(state))
        return _install(state) if when.ends_early(tick) else state

    def _start(self, state: TrainingState, length: Length) -> TrainingState:
        """Creates the average, or takes up the one that a checkpoint brought back."""
        if state.swa is None:
            zero = jnp.zeros([], jnp.result_type(float))
            new = RecipeState(init_average(state.params), zero, jnp.zeros([], bool))
            return state._replace(swa=new)
        average, lr0, _ = state.swa
        if not int(average.num_averaged):
            return state
        # The rate is the method's by now, and may not have been saved with it.
        return state._replace(
            learning_rate=self._annealed(lr0, average.num_averaged, length)
        )

    def _average(self, state: TrainingState, length: Length) -> TrainingState:
        """Averages the weights, then moves the learning rate."""
        before, lr0, installed = state.swa  # type: ignore[misc]
        rate = state.learning_rate
        check_rate("state.learning_rate", rate)
        if not is_traced(rate):
            rate = np.asarray(rate)  # wherever it was: it may meet any device's average
        lr0 = jnp.where(before.num_averaged == 0, jnp.asarray(rate, lr0.dtype), lr0)
        average = averaged_with(before, state.params)
        return state._replace(
            learning_rate=self._annealed(lr0, average.num_averaged, length),
            swa=RecipeState(average, lr0, installed),
        )

    # Both.

    def _window(self, length: Length) -> Window:
        return window(self.swa_start, self.swa_end, self.update_interval, length)

    def _annealed(self, lr0: Any, num_averaged: jax.Array, length: Length) -> jax.Array:
        """The rate once ``num_averaged`` models are in the average."""
        interval = parse_time("update_interval", self.update_interval)
        epoch = 1 if interval.unit == "ep" else length.steps("update_interval")
        anneal = swa_schedule(
            lr0,
            self.swa_lr,
            start_step=0,
            anneal_steps=self.anneal_epochs * epoch,
            strategy=self.anneal_strategy,
        )
        return anneal(num_averaged * int(interval.value))

    def _tick_size(self, length: Length) -> int:
        """Optimizer updates from one tick to the next."""
        by_epoch = parse_time("update_interval", self.update_interval).unit == "ep"
        return length.steps("optimizer updates") if by_epoch else 1


def _check_start(start: Any) -> None:
    if isinstance(start, str):
        if not parse_time("swa_start", start).value:
            raise ValueError(
                f"swa_start must be later than the start of training, got {start!r}: "
                'initial weights are never averaged; "1ep" averages the first epoch on'
            )
        return
    fix = 'give a time string, as in "8ep", to start after 8 epochs'
    number = np.ndim(start) == 0 and hasattr(start, "__float__")
    if isinstance(start, bool) or not number:
        raise TypeError(
            f"swa_start must be a fraction of training or a time string, got {start!r}"
        )
    if not 0 < float(start) < 1:
        raise ValueError(f"swa_start must be in (0, 1), got {start!r}; {fix}")


def _check_event(event: Any) -> Event:
    try:
        return Event(event)
    except ValueError:
        names = ", ".join(e.name for e in Event)
        raise ValueError(
            f"event must be a swa_jax.Event ({names}), or its value, such as "
            f"'epoch_end', got {event!r}"
        ) from None


def _known_length(num_epochs: Any, steps_per_epoch: Any) -> Length:
    check_count("steps_per_epoch", steps_per_epoch)  # None is not enough here
    return Length.of(num_epochs, steps_per_epoch)


def _tick_event(when: Window) -> Event:
    return Event.EPOCH_END if when.unit == "ep" else Event.BATCH_END


def _tick(when: Window, state: TrainingState) -> int:
    """The tick that has just come."""
    if when.unit == "ep":
        epoch = check_count("state.epoch", state.epoch, at_least=0)
        if epoch >= state.num_epochs:
            raise ValueError(
                f"state.epoch must be below num_epochs={state.num_epochs}, got "
                f"{epoch}; epochs count from 0"
            )
        return epoch + 1
    if state.num_updates is None:
        raise ValueError(
            "state.num_updates is needed to average every so many batches, got None; "
            "set it to the optimizer updates made so far, this batch's included"
        )
    updates = check_count("state.num_updates", state.num_updates)
    if updates > when.total:
        raise ValueError(
            f"state.num_updates must be at most num_epochs * steps_per_epoch = "
            f"{when.total}, got {updates}"
        )
    return updates


def _check_carried(swa: Any) -> None:
    if swa is not None and not isinstance(swa, RecipeState):
        raise TypeError(
            f"state.swa must be what apply put there, got {type(swa).__name__}; "
            "restore it into the structure that TRAINING_START creates, or set it to "
            "None to begin a new average"
        )


def _check_new(when: Window, tick: int, swa: RecipeState) -> None:
    """Raises if the model of this epoch is in the average already."""
    if when.unit == "ba":
        return  # to look would make every so many batches wait for the device
    number = (tick - when.first) // when.period
    if int(swa.average.num_averaged) > number:
        raise ValueError(
            f"state.swa has {int(swa.average.num_averaged)} models in its average at "
            f"the end of epoch {tick - 1}, which is to be number {number + 1}: it was "
            "applied twice for one epoch, or state.swa is of an earlier training; keep "
            "the state that apply returns, and set swa=None to begin a new average"
        )


def _install(state: TrainingState) -> TrainingState:
    """Makes the averaged weights the current ones."""
    assert state.swa is not None
    return state._replace(
        params=swa_params(state.swa, state.params),
        swa=state.swa._replace(installed=jnp.ones([], bool)),
    )


def _finish(
    state: TrainingState,
    batch_stats_fn: BatchStatsFn | None,
    train_batches: Callable[[], Iterable[PyTree]] | None,
) -> TrainingState:
    assert state.swa is not None
    if bool(state.swa.installed):
        return state  # training went on from the average since
    average: SWAState = state.swa.average
    if not int(average.num_averaged):
        warnings.warn(
            "SWA: training ended before any model was averaged; the weights stay as "
            "they are",
            stacklevel=3,
        )
        return state
    batch_stats = state.batch_stats
    state = _install(state)
    if not jax.tree.leaves(batch_stats):
        return state
    needed = {"batch_stats_fn": batch_stats_fn, "train_batches": train_batches}
    for name, value in needed.items():
        if not callable(value):
            raise ValueError(
                f"apply: {name} must be a function at TRAINING_END, got {value!r}: "
                "the model has batch_stats, which do not fit the averaged weights; "
                "pass batch_stats_fn=(params, batch_stats, batch) -> batch_stats and "
                "train_batches=() -> the batches of one epoch"
            )
    assert batch_stats_fn is not None
    assert train_batches is not None
    return state._replace(
        batch_stats=recompute_batch_stats(
            batch_stats_fn, state.params, batch_stats, train_batches()
        )
    )


def _metrics(state: TrainingState) -> dict[str, float]:
    average: SWAState = state.swa.average  # type: ignore[union-attr]
    return {
        "swa/num_averaged": float(average.num_averaged),
        "swa/learning_rate": float(jnp.asarray(state.learning_rate)),
        "swa/distance": float(_distance(average, state.params)),
    }


def _distance(average: SWAState, params: PyTree) -> jax.Array:
    # Where the weights are: the mean may be spread, or in host memory.
    return _norm_of_difference(jax.tree.map(beside, average.avg_params, params), params)


@jax.jit
def _norm_of_difference(tree: PyTree, other: PyTree) -> jax.Array:
    """Euclidean distance over all floating leaves, in float32 or wider."""
    total = jnp.zeros([])
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            total += jnp.sum(jnp.abs(x - jnp.asarray(y, x.dtype)) ** 2)
    return jnp.sqrt(total)
