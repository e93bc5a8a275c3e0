"""The running mean of a pytree of weights: its state, its start, its update.

With ``n`` models in the mean, the next one, ``q``, enters as

    mean <- mean + (q - mean) / (n + 1),

which stays at the weights' own scale however many are averaged. Two choices keep it
cheap. The whole step is elementwise, leaf by leaf, and selects with ``where`` instead
of branching: XLA then updates a donated mean in place, whereas a branch that captures
the weights copies all of it. And the mean is kept in float32 when the weights are
narrower, because ``(q - mean) / (n + 1)`` soon falls below the spacing of bfloat16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from swa_jax.checks import (
    check_accumulator_dtype,
    check_params,
    leaf_dtype,
    mean_dtype,
)
from swa_jax.placement import (
    Placement,
    PyTree,
    Targets,
    beside,
    bring,
    is_hosted,
    is_traced,
    place,
    resolve,
    to_device,
    to_host,
)

#: Leaves of an average in host memory that may be on the device before the first of
#: them is back. Left alone, XLA brings over all: as if the average had never left.
_IN_FLIGHT = 2


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


def init_average(
    params: PyTree,
    *,
    accumulator_dtype: Any = None,
    sharding: Placement = None,
) -> SWAState:
    """Creates an average that holds no model yet.

    The mean's buffers are computed from ``params``, so they take over its shardings,
    also under ``jax.jit``; they never alias it, so both may be donated to one call.

    Args:
      params: pytree of arrays of any shapes and dtypes. ``None`` and masked leaves
        are kept as they are. Its values are not part of the mean.
      accumulator_dtype: floating dtype in which floating leaves are averaged. By
        default float32 for anything narrower, else the leaf's own dtype. Complex
        leaves keep at least their own precision.
      sharding: where the mean lives, by default where ``params`` does: a
        ``jax.sharding.Sharding`` for every leaf, a pytree of them, or a function
        from a leaf's ``jax.ShapeDtypeStruct`` to a sharding.

    Returns:
      An ``SWAState`` with both counters at 0.

    Raises:
      TypeError: ``accumulator_dtype`` is no floating dtype, or ``sharding`` is
        neither a sharding, nor a pytree of them, nor a function to one.
      ValueError: ``accumulator_dtype`` is float64 while JAX has 64-bit types off, a
        pytree given as ``sharding`` does not fit ``params``, or a sharding does not
        divide a leaf.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> average = swa_jax.init_average({"w": jnp.zeros(2)})
      >>> for epoch in range(4):
      ...     params = {"w": jnp.array([1.0, 2.0]) * epoch}
      ...     average = swa_jax.update_average(average, params)
      >>> print(average.avg_params["w"], average.num_averaged)
      [1.5 3. ] 4

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better
      Generalization, UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1.
    """
    accumulator_dtype = check_accumulator_dtype(accumulator_dtype)

    def fresh(leaf: Any) -> jax.Array:
        dtype = mean_dtype(leaf_dtype(leaf), accumulator_dtype)
        if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys know no cast
            return jnp.copy(leaf)
        # A dtype given by name also strips weak types, which would retrace the first
        # update; `copy` makes a buffer of its own.
        return jnp.array(leaf, dtype=dtype, copy=True)

    mean = jax.tree.map(fresh, params)
    means, treedef = jax.tree.flatten(mean)
    placed = map(place, means, resolve(sharding, mean))
    # Two arrays, not one twice: the counters are donated separately.
    return SWAState(
        num_updates=jnp.zeros([], jnp.int32),
        num_averaged=jnp.zeros([], jnp.int32),
        avg_params=jax.tree.unflatten(treedef, placed),
    )


def update_average(state: SWAState, params: PyTree) -> SWAState:
    """Averages one more model: compiled, and in place.

    The old state is donated: use the returned one from then on. ``params`` stays
    valid. The mean stays in its place, sharded or in host memory, also where
    ``params`` lives elsewhere; each device then updates its own part.

    Args:
      state: from ``init_average`` or an earlier call.
      params: pytree of the structure and shapes that ``init_average`` received.

    Returns:
      The new state; both counters have advanced by one.

    Raises:
      TypeError: ``state`` is no ``SWAState``.
      RuntimeError: ``state`` has been donated already.
      ValueError: ``params`` differs from the state in structure, shape or kind of
        dtype. Nothing has been donated then: ``state`` is still good.

    Example:
      See ``init_average``.
    """
    return _run(_update_in_place, state, params)


def averaged_with(state: SWAState, params: PyTree) -> SWAState:
    """``update_average`` for those who need the old state as well: nothing is donated.

    It takes the room of a second average.
    """
    return _run(_update, state, params)


def _run(update: Callable[..., SWAState], state: SWAState, params: PyTree) -> SWAState:
    if not isinstance(state, SWAState):
        raise TypeError(
            f"update_average: state must be an SWAState, got {type(state).__name__}; "
            "make one with swa_jax.init_average(params)"
        )
    if _is_placed(state.num_updates) and state.num_updates.is_deleted():
        raise RuntimeError(
            "update_average: state has been donated to an earlier call, which reused "
            "its memory; go on with the state that that call returned"
        )
    params, targets = _meet(state.avg_params, params)
    return update(state, params, targets)


def _next_state(state: SWAState, params: PyTree, targets: Targets | None) -> SWAState:
    # While tracing, so that it costs nothing from the second call on.
    check_params(params, state.avg_params, caller="update_average")
    new = accumulate(state, params, targets=targets)
    return new._replace(num_updates=optax.safe_increment(state.num_updates))


_update = jax.jit(_next_state, static_argnums=2)
_update_in_place = jax.jit(_next_state, static_argnums=2, donate_argnums=0)


def accumulate(
    state: SWAState,
    params: PyTree,
    sample: jax.Array | None = None,
    *,
    targets: Targets | None = None,
) -> SWAState:
    """One step of the mean, to be traced into a larger computation.

    Args:
      state: the state before; its ``num_updates`` is passed through.
      params: the newcomer ``q``, structured like ``state.avg_params``.
      sample: bool scalar, whether to average; ``None`` means yes. Where it is false
        every leaf keeps its bits.
      targets: where each leaf of the mean lives, from ``placement.resolve``; by
        default beside the parameters.

    Returns:
      The state after.
    """
    n = state.num_averaged
    # Once, not for each of hundreds of leaves: it shows in the time to compile.
    first, count = n == 0, optax.safe_increment(n)
    landed: list[jax.Array] = []  # new means that are back in host memory

    def advance(mean: jax.Array, new: jax.Array, target: Sharding | None) -> jax.Array:
        hosted = is_hosted(mean)  # also where no target says so
        if hosted and len(landed) >= _IN_FLIGHT:
            mean, _ = jax.lax.optimization_barrier((mean, landed[-_IN_FLIGHT]))
        mean, new = to_device(mean, target), to_device(new)
        # The newcomer moves, never the mean: each device works on its own part.
        new = bring(new, target) if target else beside(new, mean)
        if jnp.issubdtype(mean.dtype, jnp.inexact):
            new = _next_mean(mean, new, first, count)
        elif not jnp.issubdtype(mean.dtype, jax.dtypes.extended):
            new = jnp.asarray(new, mean.dtype)  # not weakly typed, as the mean is not
        new = place(new if sample is None else jnp.where(sample, new, mean), target)
        new = to_host(new) if hosted and target is None else new
        if is_hosted(new):
            landed.append(new)
        return new

    means, treedef = jax.tree.flatten(state.avg_params)
    targets = targets or (None,) * len(means)
    new_means = map(advance, means, jax.tree.leaves(params), targets)
    return SWAState(
        num_updates=state.num_updates,
        num_averaged=count if sample is None else jnp.where(sample, count, n),
        avg_params=jax.tree.unflatten(treedef, new_means),
    )


def _next_mean(
    mean: jax.Array, new: jax.Array, first: jax.Array, count: jax.Array
) -> jax.Array:
    # An accumulator narrower than float32 was asked for to save memory, not to
    # round in between as well: compute wider, round once.
    compute = mean_dtype(mean.dtype, None)
    old, new = mean.astype(compute), jnp.asarray(new).astype(compute)
    # The first model replaces the mean: old + (new - old) would round, and would
    # carry over a non-finite start.
    step = (new - old) / count.astype(compute)
    return jnp.where(first, new, old + step).astype(mean.dtype)


def _meet(avg_params: PyTree, params: PyTree) -> tuple[PyTree, Targets | None]:
    """The weights, moved where they live on other devices than the mean.

    Also where the mean must be held, if the weights would pull it away.
    """
    means, leaves = jax.tree.leaves(avg_params), jax.tree.leaves(params)
    if len(means) == len(leaves) and all(map(_together, means, leaves)):
        return params, None  # as always in a loop, so this is quick
    check_params(params, avg_params, caller="update_average")
    moved = jax.tree.map(_on_devices_of, avg_params, params)
    return moved, tuple(map(_own_target, means, jax.tree.leaves(moved)))


def _together(mean: Any, param: Any) -> bool:
    return _is_placed(mean) and _is_placed(param) and mean.sharding == param.sharding


def _on_devices_of(mean: Any, param: Any) -> Any:
    """Moves a leaf of the weights that lives on other devices than its mean."""
    if not (_is_placed(mean) and _is_placed(param)):
        return param
    same = mean.sharding.device_set == param.sharding.device_set
    return param if same else bring(param, mean.sharding)


def _own_target(mean: Any, param: Any) -> Sharding | None:
    """Where the mean must stay, if the weights would pull it away."""
    if not _is_placed(mean) or is_traced(param) or _together(mean, param):
        return None
    return mean.sharding


def _is_placed(x: Any) -> bool:
    # Not a NumPy array, as checkpoints are restored to.
    return isinstance(x, jax.Array) and not is_traced(x)
