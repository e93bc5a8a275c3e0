"""What an average is kept in."""

from typing import Any, NamedTuple, TypeAlias

import jax

from swa_jax.checks import is_averaged
from swa_jax.placement import PyTree, is_placed


class SWAState(NamedTuple):
    """State of an average: two counters and the mean.

    It holds arrays only, so it travels inside an optimizer state through ``jax.jit``,
    ``jax.lax.scan`` and checkpoints.

    Attributes:
      num_updates: int32 scalar, the optimizer updates (or ``update_average`` calls)
        seen so far.
      num_averaged: int32 scalar, the models in the mean.
      avg_params: pytree with the structure and shapes of the parameters. Floating
        leaves hold the mean, in the accumulator's dtype; all others hold their value
        in the model that was averaged last. Without meaning while ``num_averaged``
        is 0.
    """

    num_updates: jax.Array  # int32, shape ()
    num_averaged: jax.Array  # int32, shape ()
    avg_params: PyTree  # like params; floating leaves in the accumulator's dtype


class CompensatedSWAState(NamedTuple):
    """State of an average with ``compensated=True``: an ``SWAState`` and what it lacks.

    ``swa_state`` and ``swa_params`` find the average in it. To go on with compensation
    from a plain ``average``, as from an older checkpoint, or without::

        fresh = swa_jax.init_average(average.avg_params, compensated=True)
        state = fresh._replace(
            average=average,
            compensation=jax.tree.map(jnp.zeros_like, fresh.compensation),
        )
        average = state.average  # and back

    Attributes:
      average: the average, complete and rounded to the accumulator's dtype.
      compensation: the exact mean less ``average.avg_params``, of the same structure
        and shapes, in float32 or wider; ``optax.MaskedNode()`` in place of leaves that
        are not averaged. Without meaning while ``average.num_averaged`` is 0.
    """

    average: SWAState
    compensation: PyTree  # like avg_params; float32 or wider

    @property
    def num_updates(self) -> jax.Array:
        """``average.num_updates``."""
        return self.average.num_updates

    @property
    def num_averaged(self) -> jax.Array:
        """``average.num_averaged``."""
        return self.average.num_averaged

    @property
    def avg_params(self) -> PyTree:
        """``average.avg_params``."""
        return self.average.avg_params


#: What an average is kept in.
State: TypeAlias = SWAState | CompensatedSWAState


def check_state(state: Any, *, caller: str) -> None:
    """Raises unless ``state`` is an average whose memory is still its own."""
    if not isinstance(state, State):
        raise TypeError(
            f"{caller}: state must be an SWAState, got {type(state).__name__}; "
            "make one with swa_jax.init_average(params)"
        )
    some = [state.num_updates, *jax.tree.leaves(state.avg_params)[:1]]
    if any(is_placed(x) and x.is_deleted() for x in some):
        raise RuntimeError(
            f"{caller}: state has been donated to an earlier call, which reused "
            "its memory; go on with the state that that call returned"
        )


def with_counters(
    state: State, num_updates: jax.Array, num_averaged: jax.Array
) -> State:
    """The state with other counters."""
    average = state if isinstance(state, SWAState) else state.average
    average = SWAState(num_updates, num_averaged, average.avg_params)
    if isinstance(state, SWAState):
        return average
    return state._replace(average=average)


#: What one leaf is averaged in: the mean, and what compensation there is.
Words = tuple[jax.Array, jax.Array | None]


def words_of(state: State) -> list[Words]:
    """Leaf by leaf, what the state holds of it."""
    means = jax.tree.leaves(state.avg_params)
    if isinstance(state, SWAState):
        return [(mean, None) for mean in means]
    lows = iter(jax.tree.leaves(state.compensation))
    return [(x, next(lows) if is_averaged(x.dtype) else None) for x in means]


def with_words(state: State, words: list[Words]) -> State:
    """The state with other means, and other compensation."""
    means, lows = zip(*words, strict=True) if words else ((), ())
    average = SWAState(
        num_updates=state.num_updates,
        num_averaged=state.num_averaged,
        avg_params=jax.tree.unflatten(jax.tree.structure(state.avg_params), means),
    )
    if isinstance(state, SWAState):
        return average
    lowdef = jax.tree.structure(state.compensation)
    kept = [low for low in lows if low is not None]
    return CompensatedSWAState(average, jax.tree.unflatten(lowdef, kept))
