"""Finding an average in any optimizer state, and using it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax.averaging import SWAState
from swa_jax.placement import PyTree, beside, is_traced


def swa_state(opt_state: PyTree) -> SWAState:
    """Finds the one ``SWAState`` in an optimizer state, however deeply nested.

    Args:
      opt_state: any pytree around it: the state of ``optax.chain``, ``named_chain``,
        ``MultiSteps``, ``masked``, ``partition``, ``apply_if_finite`` or
        ``inject_hyperparams``, a Flax ``TrainState``, an ``nnx.Optimizer``.

    Returns:
      The state, its counters as arrays.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      See ``swa``.
    """
    found = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            opt_state, is_leaf=_is_swa_state
        )[0]
        if _is_swa_state(leaf)
    ]
    if not found:
        raise ValueError(
            f"opt_state (a {type(opt_state).__name__}) holds no SWAState; chain "
            "swa_jax.swa(...) into the optimizer, as in optax.chain(optax.sgd(0.1), "
            "swa_jax.swa(...)), and pass the whole optimizer state"
        )
    if len(found) > 1:
        paths = ", ".join(f"opt_state{jax.tree_util.keystr(path)}" for path, _ in found)
        raise ValueError(
            f"opt_state holds {len(found)} SWAStates, where one was expected: {paths}; "
            "pass the part of opt_state with the one that you mean"
        )
    state = found[0][1]
    # Flax's nnx wraps every array of an optimizer state in a Variable.
    num_updates, num_averaged = jax.tree.leaves(state[:2])
    return state._replace(num_updates=num_updates, num_averaged=num_averaged)


def swa_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The averaged weights, ready for use in place of ``params``.

    Works inside ``jax.jit`` and outside, and never returns a buffer of the state. A
    mean that lives elsewhere (spread over devices, in host memory) is brought to
    where ``params`` is. State and parameters may share leading axes, as under
    ``jax.pmap``.

    Args:
      opt_state: optimizer state with one ``SWAState`` in it, see ``swa_state``.
      params: the current parameters. They give structure, dtypes and placement, and
        the value of every leaf that ``optax.masked`` or ``optax.partition`` hid from
        the average; while nothing has been averaged, of all leaves.

    Returns:
      A pytree like ``params``: each averaged leaf is the mean, cast to its dtype.

    Raises:
      ValueError: no state or several in ``opt_state``, or its average does not belong
        to ``params``.

    Example:
      See ``swa``.
    """
    state = swa_state(opt_state)
    average = _Average.of(state.avg_params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    some: Any = state.num_averaged > 0
    if not is_traced(some):
        some = np.asarray(some)  # else it would tie the result to its own device
    used = [_read(average.find(path, leaf), leaf, some) for path, leaf in leaves]
    surplus = average.means.keys() - {path for path, _ in leaves}
    if surplus:
        path = min(map(jax.tree_util.keystr, surplus))
        raise ValueError(
            f"swa_params: opt_state averages a parameter {path}, which params lacks; "
            "pass the parameters that the optimizer was initialised with"
        )
    return jax.tree.unflatten(treedef, used)


class _Average(NamedTuple):
    """The mean by path: its containers may differ from those of the parameters."""

    means: dict[tuple[Any, ...], jax.Array]
    masked: set[tuple[Any, ...]]  # paths of hidden leaves, or of hidden subtrees

    @classmethod
    def of(cls, avg_params: PyTree) -> "_Average":
        flat, _ = jax.tree_util.tree_flatten_with_path(avg_params, is_leaf=_is_masked)
        return cls(
            means={path: leaf for path, leaf in flat if not _is_masked(leaf)},
            masked={path for path, leaf in flat if _is_masked(leaf)},
        )

    def find(self, path: tuple[Any, ...], param: Any) -> jax.Array | None:
        """The mean for a parameter; ``None`` where it is hidden."""
        mean = self.means.get(path)
        if mean is None:
            if any(path[:end] in self.masked for end in range(len(path) + 1)):
                return None
            found = "no average"
        elif mean.shape != np.shape(param):
            found = f"an average of shape {mean.shape}"
        else:
            return mean
        raise ValueError(
            f"swa_params: for params{jax.tree_util.keystr(path)} of shape "
            f"{np.shape(param)} opt_state holds {found}; pass the parameters that the "
            "optimizer was initialised with"
        )


def _read(mean: jax.Array | None, param: Any, some: Any) -> jax.Array:
    if mean is None:
        return param
    # A mean spread over devices or kept on the host is gathered here, not before.
    param = jnp.asarray(param)
    mean = beside(mean, param)
    if mean.dtype != param.dtype:  # PRNG keys know no cast
        mean = mean.astype(param.dtype)
    leading = (*some.shape, *(1,) * (mean.ndim - some.ndim))
    return jnp.where(some.reshape(leading), mean, param)


def _is_swa_state(x: Any) -> bool:
    return isinstance(x, SWAState)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
