"""``with_batch_stats()``: BatchNorm statistics averaged along with the weights."""

from typing import Any

import jax
import numpy as np
import optax

from swa_jax import _engine
from swa_jax._loop import plan_of
from swa_jax._placement import is_placed
from swa_jax._validate import leaf_dtypes
from swa_jax.averages.swag import SWAGState
from swa_jax.typing import PyTree


def with_batch_stats(
    average: optax.GradientTransformationExtraArgs, batch_stats: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Averages BatchNorm statistics along with the weights.

    The average is then one of ``{"params": params, "batch_stats": batch_stats}``. All
    of ``average`` holds for both: when a model enters, with which weight, and in which
    dtype. Averaged statistics are not those of the averaged weights: how close they
    come depends on the momentum of the running statistics, which should follow faster
    than the average. ``recompute_batch_stats`` gives the right ones, for a pass over
    data; this needs none, and suits scores on the way.

    In a loop it is not needed: give ``init_average`` and ``update_average`` the tree
    of both.

    Args:
      average: one of this library's transformations, such as ``ema(0.999)``.
      batch_stats: the network's statistics, as training has them: a pytree of arrays,
        or of their shapes. Of arrays only shape, dtype and place are kept. Leaves that
        are not floating (counters) are those of the model averaged last.

    Returns:
      A transformation for the last place in the chain, like ``average``. Its update
      needs the keyword ``batch_stats``: the statistics after the step's forward pass,
      which ``optax.chain`` and ``nnx.Optimizer`` hand on to it.

    Raises:
      TypeError: ``average`` is none of this library's transformations; at the update,
        ``batch_stats`` is missing.
      ValueError: ``average`` is ``swag()``, which has no use for them: a drawn sample
        needs statistics of its own. At the update, ``batch_stats`` differs from the
        ones given here in structure, shape or dtype.

    Example:
      >>> import jax.numpy as jnp, optax, swa_jax
      >>> params, batch_stats = {"w": jnp.array(4.0)}, {"mean": jnp.array(0.0)}
      >>> average = swa_jax.with_batch_stats(swa_jax.swa(), batch_stats)
      >>> tx = optax.chain(optax.sgd(0.5), average)
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     grads, batch_stats = params, {"mean": params["w"]}  # of a forward pass
      ...     updates, opt_state = tx.update(
      ...         grads, opt_state, params, batch_stats=batch_stats
      ...     )
      ...     params = optax.apply_updates(params, updates)
      >>> variables = {"params": params, "batch_stats": batch_stats}
      >>> averaged = swa_jax.swa_params(opt_state, variables)
      >>> print(averaged["params"]["w"], averaged["batch_stats"]["mean"])
      1.5 3.0
    """
    plan = plan_of(average, "with_batch_stats")
    if plan.state is SWAGState:
        raise ValueError(
            "with_batch_stats: average must not be swag(): a sample drawn from it "
            "needs statistics of its own. Fix: swa_jax.recompute_batch_stats after "
            "each swag_sample"
        )
    dtypes = leaf_dtypes(batch_stats, caller="with_batch_stats", name="batch_stats")
    treedef: Any = jax.tree.structure(batch_stats)
    like = treedef.unflatten(map(_shape, jax.tree.leaves(batch_stats), dtypes))

    def init_fn(params: PyTree) -> Any:
        return _engine.initial_state(plan, {"params": params, "batch_stats": like})

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        batch_stats: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        if batch_stats is None:
            raise TypeError(
                f"with_batch_stats({plan.caller}()): update received no batch_stats, "
                "but averages them with the weights; call tx.update(grads, opt_state, "
                "params, batch_stats=batch_stats) with those of the forward pass"
            )
        new = _engine.after_update(plan, updates, state, params, batch_stats)
        return updates, new

    return _engine.Average.of(plan, init_fn, update_fn)


def _shape(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """What the average needs of an array, so that it need not be kept."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    tied = is_placed(x) and x.committed  # others are free to follow, and stay so
    return jax.ShapeDtypeStruct(
        np.shape(x), dtype, sharding=x.sharding if tied else None
    )
