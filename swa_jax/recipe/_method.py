"""The published method from its own hyperparameters: ``SWA(swa_start, anneal_epochs)``.

The same method in two forms. Inside optax, ``transform`` and ``schedule`` go into the
optimizer. In a training loop of events, ``match`` says whether the method acts on an
event and ``apply`` does it, as a pure function of a ``TrainingState``.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NoReturn

import optax

from swa_jax.recipe import _loop_form, _optax_form
from swa_jax.recipe._settings import Settings
from swa_jax.recipe._state import AnyTrainingState, Event, StateT
from swa_jax.typing import BatchStatsFn, Logger, PyTree


@dataclasses.dataclass(frozen=True)
class SWA(Settings):
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
      >>> from swa_jax import SWA, Event, TrainingState
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
        return _optax_form.schedule(self, base, num_epochs, steps_per_epoch)

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
        return _optax_form.transform(self, num_epochs, steps_per_epoch)

    # In a loop.

    def match(self, event: Event | str, state: AnyTrainingState) -> bool:
        """Whether the method acts on ``event``.

        Args:
          event: what has just happened, or its value (``"epoch_end"``).
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
        return _loop_form.match(self, event, state)

    def apply(
        self,
        event: Event | str,
        state: StateT,
        logger: Logger | None = None,
        *,
        batch_stats_fn: BatchStatsFn | None = None,
        train_batches: Callable[[], Iterable[PyTree]] | None = None,
    ) -> StateT:
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
          event: see ``match``. One that ``match`` declines changes nothing.
          state: the training state, also a NamedTuple of your own with these fields and
            more.
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
          The new state, of the same type.

        Raises:
          ValueError: no ``TRAINING_START`` before, ``params`` of another model than
            then, an epoch that was averaged already, an average of a run of another
            length, a learning rate that is negative or not finite, statistics without
            the means to recompute them; see also ``match``.
          TypeError: ``state.swa`` is not what ``apply`` returned, the learning rate is
            no number, or what should be a function is none; see also ``match``.
        """
        return _loop_form.apply(
            self, event, state, logger, batch_stats_fn, train_batches
        )


class _NotATransformationError(TypeError, AttributeError):
    """Both: the fix for who chains it, and no attribute for who asks ``hasattr``."""


_NO_TRANSFORMATION = (
    "SWA(...) is a recipe, not yet an optax transformation; use "
    "SWA(...).transform(num_epochs, steps_per_epoch)"
)
