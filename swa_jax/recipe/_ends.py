"""The average takes the weights' place: at ``swa_end`` and at the end of training."""

import warnings
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from swa_jax._placement import is_traced
from swa_jax._reading import swa_params
from swa_jax._validate import known, shown
from swa_jax.batch_stats import recompute_batch_stats
from swa_jax.recipe._metrics import equal
from swa_jax.recipe._state import RecipeState, StateT
from swa_jax.schedules import scalar_arithmetic
from swa_jax.typing import BatchStatsFn, PyTree


@scalar_arithmetic()
def install(state: StateT, tick: int | None = None) -> StateT:
    """Makes the averaged weights the current ones, if there are any."""
    swa: RecipeState = state.swa  # type: ignore[assignment]
    if tick is not None:
        swa = swa._replace(last_tick=jnp.int32(tick))
    some = swa.average.num_averaged
    if not is_traced(some) and not int(known(some)):
        return state._replace(swa=swa)
    return state._replace(
        params=swa_params(swa, state.params),
        swa=swa._replace(installed=jnp.asarray(some) > 0),
    )


def finish(
    state: StateT,
    batch_stats_fn: BatchStatsFn | None,
    train_batches: Callable[[], Iterable[PyTree]] | None,
) -> StateT:
    """Ends with the average and its statistics, unless training went on from it."""
    swa: RecipeState = state.swa  # type: ignore[assignment]
    if not int(known(swa.average.num_averaged)):
        warnings.warn(
            "SWA: training ended before any model was averaged; the weights stay as "
            "they are",
            stacklevel=3,
        )
        return state
    trained, batch_stats = state.params, state.batch_stats
    averaged = install(state)
    if bool(known(swa.installed)) and not equal(averaged.params, trained):
        return state  # training went on from the average since
    if not jax.tree.leaves(batch_stats):
        return averaged
    if batch_stats_fn is None or train_batches is None:
        missing = "batch_stats_fn" if batch_stats_fn is None else "train_batches"
        raise ValueError(
            f"apply: {missing} must be a function at TRAINING_END, got None: the model "
            "has batch_stats, which do not fit the averaged weights; pass "
            "batch_stats_fn=(params, batch_stats, batch) -> batch_stats and "
            "train_batches=() -> the batches of one epoch"
        )
    batches = train_batches()
    if not isinstance(batches, Iterable) and callable(batches):
        raise TypeError(
            f"apply: train_batches must return batches, got {shown(batches)}, which is "
            "a function; pass train_batches=() -> the batches of one epoch"
        )
    new = recompute_batch_stats(batch_stats_fn, averaged.params, batch_stats, batches)
    return averaged._replace(batch_stats=new)
