"""``swa()``: the mean of the weights along the training trajectory."""

from typing import NamedTuple

import jax
import optax
from jax.typing import DTypeLike

from swa_jax import _engine, _leafwise, _rules
from swa_jax.typing import Placement, PyTree


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

    @classmethod
    def of(
        cls,
        num_updates: jax.Array,
        num_averaged: jax.Array,
        avg_params: PyTree,
        compensation: PyTree,
    ) -> "CompensatedSWAState":
        """From its fields and those of the average."""
        return cls(SWAState(num_updates, num_averaged, avg_params), compensation)


def swa(
    start_step: int = 0,
    period: int = 1,
    *,
    stop_step: int | None = None,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
    compensated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights along the training trajectory.

    After update number ``t`` (the first is 1) the new weights
    ``q = optax.apply_updates(params, updates)`` enter the mean iff::

        t >= start_step  and  (t - start_step) % period == 0
        and (stop_step is None or t <= stop_step)

    by ``mean += (q - mean) / (num_averaged + 1)``. On all other steps the mean keeps
    its bits. With ``S`` steps an epoch, ``swa(start_step=e * S, period=S)`` averages
    the ends of epochs e, e + 1, ... counted from 1. The initial weights are never
    part of the mean.

    Put it last in the chain: it needs the updates as they will be applied, and hands
    them on unchanged. Read the result with ``swa_params``; a network with batch
    normalisation then needs ``recompute_batch_stats``.

    Args:
      start_step: number of the first update whose weights are averaged, >= 0; 0 and 1
        both average from the first update on, but differ in phase if ``period > 1``.
      period: average every so many updates, >= 1.
      stop_step: number of the last update that may be averaged, >= ``start_step``;
        ``None`` for no end.
      accumulator_dtype: dtype of the mean, see ``init_average``.
      sharding: where the mean lives, see ``init_average``; under ``jax.jit`` only, for
        in ``shard_map`` and ``pmap`` each device has a program of its own. For host
        memory, drive the average with ``update_average`` instead: inside the training
        step every step, also a skipped one, would carry the mean to the device and
        back.
      skip_nonfinite: leave a model with any NaN or infinity out of the mean (it does
        not count in ``num_averaged`` either). Costs one more read of the weights a
        step, and, where parameters are sharded, an all-reduce of scalars. Under
        ``shard_map`` each device looks at its own shard only: use it where parameters
        are replicated, or under ``jit``.
      compensated: carry along what the mean's dtype cannot hold, see ``init_average``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``SWAState``, or
      ``CompensatedSWAState``.

    Raises:
      ValueError: negative ``start_step``, ``period < 1``, ``stop_step < start_step``,
        any of them too large for int32; at the update, ``params`` missing or other
        than those that the state was created from.
      TypeError: a step that is no integer; see ``init_average`` for the rest.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swa_jax
      >>> tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=3))
      >>> params = {"w": jnp.array([4.0, -2.0])}
      >>> opt_state = tx.init(params)
      >>> for _ in range(5):
      ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(swa_jax.swa_state(opt_state).num_averaged)
      3
      >>> [round(float(w), 3) for w in swa_jax.swa_params(opt_state, params)["w"]]
      [1.666, -0.833]

    References:
      Izmailov et al., Averaging Weights Leads to Wider Optima and Better
      Generalization, UAI 2018, https://arxiv.org/abs/1803.05407, algorithm 1.
    """
    kind: _leafwise.Kind = _leafwise.Mean(_rules.Equal())
    return _engine.transformation(
        "swa",
        CompensatedSWAState if compensated else SWAState,
        _leafwise.CompensatedMean() if compensated else kind,
        (start_step, period, stop_step),
        accumulator_dtype=accumulator_dtype,
        sharding=sharding,
        skip_nonfinite=skip_nonfinite,
    )
