"""What a training loop tells the method, what the method keeps, and their checks."""

import enum
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from swa_jax._placement import is_traced
from swa_jax._validate import check_count, known, shown
from swa_jax.averages.swa import SWAState
from swa_jax.recipe._timing import Window
from swa_jax.typing import PyTree, Rate


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
        at the first model taken up, 0 before.
      first_tick: int32 scalar, the tick (see ``_timing``) of that model, 0 before.
      last_tick: int32 scalar, the latest tick taken up, 0 before.
      installed: bool scalar, whether training went on from the average (``swa_end``),
        or ended with it.
    """

    average: SWAState
    initial_lr: jax.Array  # float32 (float64 with 64-bit types), shape ()
    first_tick: jax.Array  # int32, shape ()
    last_tick: jax.Array  # int32, shape ()
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
    learning_rate: Rate
    swa: RecipeState | None = None
    num_updates: int | None = None
    steps_per_epoch: int | None = None


class AnyTrainingState(Protocol):
    """A ``TrainingState``, or a NamedTuple of one's own with its fields and more."""

    @property
    def epoch(self) -> int: ...
    @property
    def num_epochs(self) -> int: ...
    @property
    def params(self) -> PyTree: ...
    @property
    def batch_stats(self) -> PyTree: ...
    @property
    def learning_rate(self) -> Rate: ...
    @property
    def swa(self) -> RecipeState | None: ...
    @property
    def num_updates(self) -> int | None: ...
    @property
    def steps_per_epoch(self) -> int | None: ...
    def _replace(self, *args: Any, **kwargs: Any) -> Any: ...


#: The caller's own type of training state, which is given back.
StateT = TypeVar("StateT", bound=AnyTrainingState)


def check_arguments(event: Any, state: Any) -> Event:
    """Returns the event, or raises if either is another kind of thing."""
    missing = [name for name in TrainingState._fields if not hasattr(state, name)]
    if missing:
        swapped = isinstance(event, TrainingState)
        fix = "the event comes first: match(event, state), apply(event, state)"
        raise TypeError(
            f"state must be a swa_jax.TrainingState, got {shown(state)}; "
            + (fix if swapped else f"it lacks {', '.join(missing)}")
        )
    try:
        return Event(event)
    except ValueError:
        names = ", ".join(e.name for e in Event)
        raise ValueError(
            f"event must be a swa_jax.Event ({names}), or its value, such as "
            f"'epoch_end', got {shown(event)}"
        ) from None


def check_functions(**functions: Any) -> None:
    """Raises if an argument is neither a function nor ``None``."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            fix = f"; pass {name}=lambda: ..." if name == "train_batches" else ""
            raise TypeError(
                f"apply: {name} must be a function or None, got {shown(value)}{fix}"
            )


def tick_event(when: Window) -> Event:
    """The event that a tick is."""
    return Event.EPOCH_END if when.unit == "ep" else Event.BATCH_END


def current_tick(when: Window, state: AnyTrainingState) -> int:
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


def check_carried(swa: Any) -> None:
    """Raises unless ``swa`` is the method's own state, or ``None``."""
    found, kept = swa, isinstance(swa, RecipeState)
    if kept and not isinstance(swa.average, SWAState):
        found, kept = swa.average, False  # restored down to there alone
    if swa is not None and not kept:
        raise TypeError(
            f"state.swa must be what apply put there, got {type(found).__name__}; "
            "restore it into the structure that TRAINING_START creates, or set it to "
            "None to begin a new average"
        )


def check_new(when: Window, tick: int, swa: RecipeState) -> None:
    """Raises if this tick was taken up before, or the average is of another window."""
    if is_traced(swa.last_tick):
        return
    # From the host, both: nothing that the device computes is waited for.
    last = int(known(swa.last_tick))
    if tick <= last:
        once = "epoch" if when.unit == "ep" else "optimizer update"
        raise ValueError(
            f"state.swa has taken up {when.describe(last)} already, at the end of "
            f"{when.describe(tick)}: it was applied twice for one, or state.swa is of "
            f"an earlier training; apply once an {once}, keep the state that it "
            "returns, and set swa=None to begin a new average"
        )
    check_window(when, swa)


def first_or(first_tick: jax.Array, tick: int) -> jax.Array:
    """The first tick, ``tick`` if there was none before."""
    if is_traced(first_tick):
        return jnp.where(first_tick == 0, tick, first_tick)
    return first_tick if int(known(first_tick)) else jnp.int32(tick)


def check_window(when: Window, swa: RecipeState) -> None:
    """Raises if the average began before this window does."""
    first = int(known(swa.first_tick))
    if 0 < first < when.when.start:
        raise ValueError(
            f"state.swa averages from {when.describe(first)} on, but in a run of this "
            f"length averaging starts with {when.describe(when.when.start)}: it is of "
            "another run; set swa=None to begin a new average"
        )
