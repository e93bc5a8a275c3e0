"""The published method from its own hyperparameters: ``SWA(swa_start, anneal_epochs)``.

The same method in two forms. Inside optax, ``transform`` and ``schedule`` go into the
optimizer. In a training loop of events, ``match`` says whether the method acts on an
event and ``apply`` does it, as a pure function of a ``TrainingState``. Both average the
same models and give the same learning rates, because both ask one ``Window`` when to
sample and one anneal for the rate.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax._reading import swa_params
from swa_jax.averaging import SWAState, averaged_with, init_average
from swa_jax.batch_stats import BatchStatsFn
from swa_jax.placement import PyTree, is_traced
from swa_jax.recipe.ends import finish, install
from swa_jax.recipe.metrics import finite, metrics
from swa_jax.recipe.state import (
    Event,
    RecipeState,
    TrainingState,
    check_arguments,
    check_carried,
    check_functions,
    check_new,
    check_window,
    current_tick,
    first_or,
    tick_event,
)
from swa_jax.scalars import check_count, check_rate, known, shown
from swa_jax.schedules import (
    Strategy,
    anneal,
    as_schedule,
    as_step,
    check_strategy,
    scalar_arithmetic,
)
from swa_jax.timing import Length, Window, parse_time, window
from swa_jax.transform import swa

Logger = Callable[[dict[str, float]], object]


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
      skip_nonfinite: leave a model with any NaN or infinity out of the average. The
        learning rate moves on as if it had been averaged, in both forms. ``apply``
        waits for the weights then.

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
    skip_nonfinite: bool = False

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
        if not isinstance(self.skip_nonfinite, bool | np.bool_):
            raise TypeError(
                "skip_nonfinite must be True or False, got "
                f"{shown(self.skip_nonfinite)}"
            )

    # Inside optax.

    @property
    def init(self) -> NoReturn:
        """Not there: what optax looks for in a transformation."""
        raise _NotATransformationError(_NO_TRANSFORMATION)

    update = init

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
          ValueError: nothing would be averaged, a number below 1, or more updates than
            int32 counts.
          TypeError: a number that is no integer, or a ``base`` that is neither a rate
            nor a schedule.
        """
        length = _known_length(num_epochs, steps_per_epoch)
        when, size = self._window(length), self._tick_size(length)
        base = as_schedule(base)

        @scalar_arithmetic()
        def schedule(step: Any) -> jax.Array:
            step = as_step(step)
            number = when.number(jnp.minimum(step // size, when.last))
            lr0 = base(jnp.asarray(when.first * size - 1, step.dtype))
            annealed = self._annealed(lr0, number, length)
            return jnp.where(number > 0, annealed, base(step))

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
          ValueError: nothing would be averaged, a number below 1, or more updates than
            int32 counts.
          TypeError: a number that is no integer.
        """
        length = _known_length(num_epochs, steps_per_epoch)
        when, size = self._window(length), self._tick_size(length)
        return swa(
            when.first * size,
            when.period * size,
            stop_step=when.last * size,
            skip_nonfinite=bool(self.skip_nonfinite),
        )

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
          TypeError: arguments in another order, a ``state`` that is no
            ``TrainingState``, or a number in it that is no integer.
        """
        event = check_arguments(event, state)
        when = self._window(Length.of(state.num_epochs, state.steps_per_epoch))
        if event in (Event.TRAINING_START, Event.TRAINING_END):
            return True
        if when.unit == "ep":
            current_tick(when, state)  # a wrong epoch is found as early as may be
        if event is not tick_event(when):
            return False
        tick = current_tick(when, state)
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
          statistics recomputed for them. Where training went on from the average, at
          ``swa_end``, both stay as training has left them.

        All that is needed later is in ``TrainingState.swa``, a pytree: a state that is
        saved and restored goes on exactly.

        Args:
          event: what has just happened. One that ``match`` declines changes nothing.
          state: the training state.
          logger: called with a dict of floats after each model that was to be averaged:
            ``"swa/num_averaged"``, ``"swa/learning_rate"`` and ``"swa/distance"``, the
            Euclidean distance between average and weights (NaN for weights that are
            not finite).
          batch_stats_fn: one forward pass in training mode, see
            ``recompute_batch_stats``; needed at ``TRAINING_END`` if ``batch_stats``
            has any leaf.
          train_batches: function without arguments to the batches of one epoch of
            training data, for ``batch_stats_fn``.

        Returns:
          The new state.

        Raises:
          ValueError: no ``TRAINING_START`` before, ``params`` of another model than
            then, an epoch that was averaged already, an average of a run of another
            length, a learning rate that is negative or not finite, statistics without
            the means to recompute them; see also ``match``.
          TypeError: ``state.swa`` is not what ``apply`` returned, the learning rate is
            no number, or what should be a function is none; see also ``match``.
        """
        event = check_arguments(event, state)
        check_functions(
            logger=logger, batch_stats_fn=batch_stats_fn, train_batches=train_batches
        )
        if callable(state.learning_rate):  # else it is looked at when it is needed
            check_rate("state.learning_rate", state.learning_rate)
        if not self.match(event, state):
            return state
        check_carried(state.swa)
        length = Length.of(state.num_epochs, state.steps_per_epoch)
        if event is Event.TRAINING_START:
            return self._start(state, length)
        if state.swa is None:
            raise ValueError(
                f"apply: state.swa is None at {event.name}: the average is created at "
                "Event.TRAINING_START; apply that first, and keep the state it returns"
            )
        if event is Event.TRAINING_END:
            return finish(state, batch_stats_fn, train_batches)
        when = self._window(length)
        tick = current_tick(when, state)
        check_new(when, tick, state.swa)
        if when.samples(tick):
            state = self._average(state, length, tick)
            if logger is not None:
                logger(metrics(state))
        return install(state, tick) if when.ends_early(tick) else state

    @scalar_arithmetic()
    def _start(self, state: TrainingState, length: Length) -> TrainingState:
        """Creates the average, or takes up the one that a checkpoint brought back."""
        when = self._window(length)
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
        number = when.number(int(known(state.swa.last_tick)))
        rate = self._annealed(state.swa.initial_lr, number, length)
        return state._replace(learning_rate=rate)

    @scalar_arithmetic()
    def _average(
        self, state: TrainingState, length: Length, tick: int
    ) -> TrainingState:
        """Averages the weights, then moves the learning rate."""
        before: RecipeState = state.swa  # type: ignore[assignment]
        rate = state.learning_rate
        check_rate("state.learning_rate", rate)
        if not is_traced(rate):
            rate = np.asarray(known(rate))  # it may meet the average of any device
        lr0 = before.initial_lr
        lr0 = jnp.where(before.first_tick == 0, jnp.asarray(rate, lr0.dtype), lr0)
        after = RecipeState(
            average=self._averaged(before.average, state.params),
            initial_lr=lr0,
            first_tick=first_or(before.first_tick, tick),
            last_tick=jnp.int32(tick),
            installed=before.installed,
        )
        number = self._window(length).number(tick)
        return state._replace(
            learning_rate=self._annealed(lr0, number, length), swa=after
        )

    def _averaged(self, average: SWAState, params: PyTree) -> SWAState:
        if self.skip_nonfinite and not bool(known(finite(params))):
            return average
        return averaged_with(average, params)

    # Both.

    def _window(self, length: Length) -> Window:
        return window(self.swa_start, self.swa_end, self.update_interval, length)

    def _annealed(self, lr0: Any, number: Any, length: Length) -> jax.Array:
        """The rate once so many models have had their turn in the average."""
        interval = parse_time("update_interval", self.update_interval)
        epoch = 1 if interval.unit == "ep" else length.steps("update_interval")
        intervals = self.anneal_epochs * epoch / interval.value
        return anneal(lr0, self.swa_lr, number, float(intervals), self.anneal_strategy)

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
            "swa_start must be a fraction of training or a time string, got "
            f"{shown(start)}"
        )
    if not 0 < float(start) < 1:
        raise ValueError(f"swa_start must be in (0, 1), got {shown(start)}; {fix}")


class _NotATransformationError(TypeError, AttributeError):
    """Both: the fix for who chains it, and no attribute for who asks ``hasattr``."""


_NO_TRANSFORMATION = (
    "SWA(...) is a recipe, not yet an optax transformation; use "
    "SWA(...).transform(num_epochs, steps_per_epoch)"
)


def _known_length(num_epochs: Any, steps_per_epoch: Any) -> Length:
    check_count("steps_per_epoch", steps_per_epoch)  # None is not enough here
    length = Length.of(num_epochs, steps_per_epoch)
    length.updates()
    return length
