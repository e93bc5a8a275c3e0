"""Using an average that an optimizer state holds: its weights, and its count."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax._finding import average_state, holds_average, located
from swa_jax._placement import beside, is_traced, unwrapped
from swa_jax._states import with_counters
from swa_jax._validate import MAX_COUNT, is_weight
from swa_jax.averages.swa import SWAState
from swa_jax.typing import PyTree, TreeT, Which


def swa_params(opt_state: PyTree, params: TreeT, *, allow_empty: bool = False) -> TreeT:
    """The averaged weights, ready for use in place of ``params``.

    Works inside ``jax.jit`` and outside, and never returns a buffer of the state or of
    ``params``. A mean that lives elsewhere (spread over devices, in host memory) is
    brought to where ``params`` is. State and parameters may share leading axes, as
    under ``jax.pmap``.

    Args:
      opt_state: optimizer state with one ``SWAState`` in it, see ``swa_state``.
      params: the current parameters. They give structure, dtypes and placement, and
        the value of every leaf that ``optax.masked`` or ``optax.partition`` hid from
        the average; while nothing has been averaged, of all leaves. Where the average
        has ``None``, anything but an array of floats is returned as it is, so that a
        whole Equinox model may be given.
      allow_empty: nothing averaged yet is expected, as in evaluation before the start:
        no warning.

    Returns:
      A pytree like ``params``: each averaged leaf is the mean, cast to its dtype.

    Raises:
      ValueError: no state or several in ``opt_state``, or its average does not belong
        to ``params``.

    Warns:
      UserWarning: nothing has been averaged, so that the result is ``params``. Inside
        ``jax.jit`` the counters are not known and nothing is said: look at
        ``swa_state(opt_state).num_averaged`` outside.

    Example:
      See ``swa``.
    """
    state = found_for("swa_params", opt_state, params, SWAState)
    return as_params("swa_params", state, state.avg_params, params, allow_empty)


def averaged_params(
    opt_state: PyTree, params: TreeT, which: Which = None, *, allow_empty: bool = False
) -> TreeT:
    """The weights of any average, ready for use in place of ``params``.

    It needs none of the average's hyperparameters. For the rest see ``swa_params``,
    which is the same for the one ``SWAState``.

    Args:
      opt_state: optimizer state, or an average's own, see ``swa_state``.
      params: the current parameters, see ``swa_params``.
      which: one of several averages, see ``average_state``.
      allow_empty: see ``swa_params``.

    Returns:
      A pytree like ``params``: each averaged leaf is the mean, cast to its dtype.

    Raises:
      ValueError: see ``average_state`` and ``swa_params``.
      TypeError: see ``average_state``.

    Warns:
      UserWarning: see ``swa_params``.

    Example:
      >>> import jax.numpy as jnp, optax, swa_jax
      >>> tx = optax.chain(optax.sgd(0.5), swa_jax.swa(), swa_jax.ema(0.5))
      >>> params = jnp.array([8.0, 4.0])
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(swa_jax.averaged_params(opt_state, params, swa_jax.SWAState))
      [3.  1.5]
      >>> average = swa_jax.averaged_params(opt_state, params, swa_jax.EMAState)
      >>> print([round(float(x), 3) for x in average])  # (4 + 2 * 2) / 3
      [2.667, 1.333]
    """
    state = found_for("averaged_params", opt_state, params, which)
    return as_params("averaged_params", state, state.avg_params, params, allow_empty)


def found_for(caller: str, opt_state: PyTree, params: PyTree, which: Which) -> Any:
    """``average_state``, for who may have swapped its arguments."""
    if not holds_average(opt_state) and holds_average(params):
        raise ValueError(
            f"{caller}: params holds an average and opt_state does not; they were "
            f"swapped, call {caller}(opt_state, params)"
        )
    return average_state(opt_state, which)


def as_params(
    caller: str, state: Any, weights: PyTree, params: TreeT, allow_empty: bool
) -> TreeT:
    """Weights of the state's structure as those of ``params``, if there are any yet."""
    leaves, treedef = jax.tree.flatten(params)
    found = _matched(caller, weights, params)
    some = _some_averaged(caller, state, allow_empty)
    used = [_as_param(*pair, some) for pair in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(treedef, used)


def with_num_updates(opt_state: TreeT, num_updates: Any, which: Which = None) -> TreeT:
    """Tells an average how many updates the run has made: SWA for a run under way.

    ``start_step`` and ``period`` count the updates that ``swa()`` has seen. In a run
    that began without it, that count would begin at 0; this sets it to the run's own.
    Averaging then goes on as if ``swa()`` had been there from the start. Inside
    ``optax.MultiSteps`` an update is an optimizer step, its ``gradient_step``.

    Args:
      opt_state: optimizer state with one ``SWAState`` in it, see ``swa_state``.
      num_updates: optimizer updates made so far, >= 0: an integer or integer array,
        also a traced one, of shape () or that of the counters under ``jax.pmap``.
      which: one of several averages, see ``average_state``.

    Returns:
      A new optimizer state; all else in it is as it was, the same buffers included.

    Raises:
      TypeError: ``num_updates`` is no integer.
      ValueError: it is negative, beyond int32, of another shape, or less than the
        state's own count while models are averaged, some of which would then enter
        twice. Inside ``jax.jit`` values cannot be checked.

    Example:
      >>> import jax.numpy as jnp, optax, swa_jax
      >>> params, old = jnp.ones(2), optax.sgd(0.1).init(jnp.ones(2))  # restored
      >>> tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=800))
      >>> _, average = tx.init(params)
      >>> opt_state = swa_jax.with_num_updates((old, average), 600)
      >>> print(swa_jax.swa_state(opt_state).num_updates)
      600
    """
    count = _checked_count(num_updates, average_state(opt_state, which))
    state = located(opt_state, which)

    def replace(node: Any) -> Any:
        if node is not state:
            return node
        counter = jax.tree.map(lambda old: _filled(old, count), node.num_updates)
        return with_counters(node, counter, node.num_averaged)

    return jax.tree.map(replace, opt_state, is_leaf=lambda x: x is state)


def _some_averaged(caller: str, state: Any, allow_empty: bool) -> bool | jax.Array:
    """Whether there is a mean, for each of the counters; warns where there is none."""
    if is_traced(state.num_averaged):
        return state.num_averaged > 0
    # On the host, else it would tie the result to its own device.
    some: Any = np.asarray(jax.device_get(state.num_averaged)) > 0
    if not (allow_empty or some.all()):
        counts = [_span(x) for x in _counters(state)]
        warnings.warn(
            f"{caller}: nothing has been averaged (num_updates={counts[0]}, "
            f"num_averaged={counts[1]}), so these are the current weights. Either no "
            "update has come to start_step yet (it counts optimizer updates, inside "
            "optax.MultiSteps not mini-batches), or swa() was added to a run under "
            "way and counts from 0: then set swa_jax.with_num_updates(opt_state, step) "
            "before going on. Where this is expected, pass allow_empty=True",
            stacklevel=4,
        )
    return jax.device_put(some) if some.ndim else bool(some)


def _counters(state: Any) -> tuple[Any, Any]:
    return state.num_updates, state.num_averaged


def _span(counter: Any) -> str:
    """One number, or the range over replicas."""
    if is_traced(counter):
        return "unknown"
    counts = np.asarray(jax.device_get(counter))
    low, high = counts.min(), counts.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _matched(caller: str, avg_params: PyTree, params: PyTree) -> list[Any]:
    """The mean of each parameter in order; ``None`` where it is hidden."""
    flatten = jax.tree_util.tree_flatten_with_path
    flat, *structure = flatten(avg_params, is_leaf=_is_masked)
    leaves, *expected = flatten(params)
    fix = "pass the parameters that the optimizer was initialised with"
    if isinstance(avg_params, dict) and avg_params.keys() == {"params", "batch_stats"}:
        fix = 'pass the tree of both, {"params": params, "batch_stats": batch_stats}'
    elif _is_nnx(params):
        fix += ", here nnx.state(model, nnx.Param)"
    if len(dict(flat)) == len(flat) and len(dict(leaves)) == len(leaves):
        slots, _ = flatten(avg_params, is_leaf=lambda x: x is None or _is_masked(x))
        means = _matched_by_path(caller, dict(slots), leaves, fix)
    elif structure == expected:  # of a node that gives two children one key
        means = [None if _is_masked(leaf) else leaf for _, leaf in flat]
    else:
        raise ValueError(
            f"{caller}: in params or in the average in opt_state one path names two "
            f"leaves, and their structures differ, so none can be told apart; {fix}"
        )
    for (path, param), mean in zip(leaves, means, strict=True):
        if mean is not None and np.shape(mean) != np.shape(param):
            found = f"an average of shape {np.shape(mean)}"
            raise ValueError(_misfit(caller, path, param, found, fix))
    return means


def _matched_by_path(
    caller: str, averages: dict[Any, Any], leaves: list[tuple[Any, Any]], fix: str
) -> list[Any]:
    """The same, where the containers of average and parameters may differ."""
    hidden = {path for path, leaf in averages.items() if _is_masked(leaf)}
    absent = {path for path, leaf in averages.items() if leaf is None}
    means: list[Any] = []
    for path, param in leaves:
        if _is_within(path, hidden) or (
            _is_within(path, absent) and not is_weight(param)
        ):
            means.append(None)
        elif path in averages and path not in absent:
            means.append(averages[path])
        else:
            raise ValueError(_misfit(caller, path, param, "no average", fix))
    surplus = averages.keys() - hidden - absent - {path for path, _ in leaves}
    if surplus:
        path = min(map(jax.tree_util.keystr, surplus))
        raise ValueError(
            f"{caller}: opt_state averages a parameter {path}, which params lacks; "
            f"{fix}"
        )
    return means


def _is_within(path: Any, places: set[Any]) -> bool:
    """Whether one of ``places`` is that of a leaf, or of a subtree around it."""
    return any(path[:end] in places for end in range(len(path) + 1))


def _misfit(caller: str, path: Any, param: Any, found: str, fix: str) -> str:
    return (
        f"{caller}: for params{jax.tree_util.keystr(path)} of shape "
        f"{np.shape(param)} opt_state holds {found}; {fix}"
    )


def _as_param(mean: Any, param: Any, some: bool | jax.Array) -> jax.Array:
    """The value to use, in a buffer of its own."""
    if mean is None and not (isinstance(param, jax.Array) or is_weight(param)):
        return param  # a function, say, or NumPy's integers, perhaps of 64 bits
    if not isinstance(param, jax.Array):
        param = jax.device_put(
            unwrapped(param)
        )  # explicitly, as a transfer guard demands
    if mean is None or some is False:
        return jnp.copy(param)
    # A mean spread over devices or kept on the host is gathered here, not before.
    mean = beside(mean, param)
    cast = mean.dtype != param.dtype  # PRNG keys know no cast
    mean = mean.astype(param.dtype) if cast else mean
    if some is True:
        return mean if cast else jnp.copy(mean)
    leading = (*some.shape, *(1,) * (mean.ndim - some.ndim))
    return jnp.where(some.reshape(leading), mean, param)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_nnx(x: Any) -> bool:
    """Whether ``x`` is of Flax's nnx, which need not be installed."""
    return any(base.__module__.startswith("flax.nnx") for base in type(x).__mro__)


# Setting the count.


def _checked_count(num_updates: Any, state: Any) -> Any:
    """The count as an array; Flax's nnx wraps it in a Variable."""
    leaves = jax.tree.leaves(num_updates)
    count: Any = leaves[0] if len(leaves) == 1 else None
    if not is_traced(count):
        count = np.asarray(jax.device_get(count))
    if not jnp.issubdtype(count.dtype, np.integer):
        raise TypeError(
            "with_num_updates: num_updates must be an int32 integer, got "
            f"{type(num_updates).__name__} of dtype {count.dtype}; it counts optimizer "
            "updates"
        )
    expected = np.shape(state.num_updates)
    if count.shape not in ((), expected):
        raise ValueError(
            f"with_num_updates: num_updates has shape {count.shape}, the counters of "
            f"opt_state have {expected}; pass one number for all"
        )
    if not is_traced(count):
        _check_value(count, state)
    return count


def _check_value(count: np.ndarray, state: Any) -> None:
    if not 0 <= count.min() <= count.max() <= MAX_COUNT:
        raise ValueError(
            f"with_num_updates: num_updates must be between 0 and {MAX_COUNT} (int32), "
            f"got {_span(count)}; it counts optimizer updates"
        )
    if any(map(is_traced, _counters(state))):
        return
    seen, averaged = map(np.asarray, jax.device_get(_counters(state)))
    if ((count < seen) & (averaged > 0)).any():
        raise ValueError(
            f"with_num_updates: num_updates={_span(count)} is less than the "
            f"{_span(seen)} updates that opt_state has seen, and num_averaged="
            f"{_span(averaged)} of them are averaged: some would enter twice. Fix: "
            "pass the run's own number, or begin a new average with tx.init(params)"
        )


def _filled(old: Any, count: Any) -> jax.Array:
    """``count`` with the shape and place of the counter ``old``."""
    if is_traced(old) or is_traced(count):
        return beside(jnp.broadcast_to(jnp.asarray(count, jnp.int32), old.shape), old)
    value = np.broadcast_to(count, np.shape(old)).astype(np.int32)
    # A counter from tx.init is free to follow the parameters, and stays so.
    tied = isinstance(old, jax.Array) and old.committed
    return jax.device_put(value, old.sharding if tied else None)
