"""An average driven from a loop, once an epoch: the same step, compiled by itself."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from swa_jax import _engine
from swa_jax._newcomer import weights_of
from swa_jax._placement import (
    Targets,
    as_array,
    follow,
    is_scattered,
    meet,
    together,
    unwrapped,
)
from swa_jax._states import models_like, with_counters, with_words, words_of
from swa_jax._validate import check_params, check_sample, shown
from swa_jax.averages.swa import CompensatedSWAState, swa
from swa_jax.typing import Placement, PyTree, Sample, TreeT


def init_average(
    params: PyTree,
    average: optax.GradientTransformationExtraArgs | None = None,
    *,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    compensated: bool = False,
) -> Any:
    """Creates an average that holds no model yet.

    The mean's buffers are computed from ``params``, so they take over its shardings,
    also under ``jax.jit``; they never alias it, so both may be donated to one call.

    Args:
      params: pytree of arrays of any shapes and dtypes. ``None`` and masked leaves
        are kept as they are. Its values are not part of the mean. For a
        ``jax.ShapeDtypeStruct`` the mean starts from zeros, real ones, with its
        sharding, as in Optax's own transformations; ``jax.eval_shape`` gives a state
        without memory.
      average: the transformation whose average it shall be, such as
        ``swa_jax.ema(0.999)``; by default the equal mean. Its own ``start_step``,
        ``period`` and ``stop_step`` then count calls of ``update_average``.
      accumulator_dtype: floating dtype in which floating leaves are averaged. By
        default float32 for anything narrower, else the leaf's own dtype. Complex
        leaves keep at least their own precision.
      sharding: where the mean lives, by default where ``params`` does: a
        ``jax.sharding.Sharding`` for every leaf, a pytree of them, or a function
        from a leaf's ``jax.ShapeDtypeStruct`` to a sharding.
      compensated: carry along what the mean's dtype cannot hold, in one more buffer
        (of float32, for narrower means too). The mean is then good to the last place
        for any number of models; a plain float32 mean of weights near 1 is off by
        1e-6 after 1,000 models, and stops to follow from 10**5 on.

    Returns:
      An ``SWAState``, or a ``CompensatedSWAState``, with both counters at 0.

    Raises:
      TypeError: a leaf of ``params`` is no array, ``accumulator_dtype`` is no floating
        dtype, or ``sharding`` is neither a sharding, nor a pytree of them, nor a
        function to one.
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
    options: dict[str, Any] = {
        "accumulator_dtype": accumulator_dtype,
        "sharding": sharding,
        "compensated": compensated,
    }
    given = [name for name, value in options.items() if value not in (None, False)]
    if average is None:
        average = swa(**options)
    elif given:
        raise TypeError(
            f"init_average: {', '.join(given)} cannot be given next to an average, "
            "which has options of its own; pass them to it, as in "
            "ema(0.999, accumulator_dtype=..., sharding=...)"
        )
    return _engine.initial_state(
        plan_of(average, "init_average"), params, caller="init_average"
    )


def update_average(
    state: TreeT,
    params: PyTree,
    average: optax.GradientTransformationExtraArgs | None = None,
    *,
    sample: Sample = None,
    skip_nonfinite: bool = False,
) -> TreeT:
    """Averages one more model: compiled, and in place.

    The old state is donated: use the returned one from then on. ``params`` stays
    valid. The mean stays in its place, sharded or in host memory, also where
    ``params`` lives elsewhere; each device then updates its own part.

    Args:
      state: from ``init_average`` or an earlier call.
      params: pytree of the structure and shapes that ``init_average`` received. Where
        that had ``None``, anything but an array of floats is passed by: the model of
        ``eqx.filter(model, eqx.is_inexact_array)`` may be given whole.
      average: what ``init_average`` received. Equal ones share a compiled program, so
        it may be made anew for every call, unless its decay is a function of your own.
      sample: bool, or bool scalar as an array, also traced: whether to average. Where
        it is false, ``avg_params`` and ``num_averaged`` keep every bit and
        ``num_updates`` advances all the same. ``None`` means yes. True and false share
        one compiled program.
      skip_nonfinite: leave a model with any NaN or infinity out of the mean, as if
        ``sample`` were false. Costs one more read of the weights.

    Returns:
      The new state.

    Raises:
      TypeError: ``state`` is none of ``init_average``'s, a leaf of ``params`` is no
        array, or ``sample`` is no bool.
      RuntimeError: ``state`` has been donated already.
      ValueError: ``params`` differs from the state in structure, shape or kind of
        dtype, or ``sample`` is not a scalar. Nothing has been donated then: ``state``
        is still good.

    Example:
      See ``init_average``, and ``averaged_with`` for ``sample``.
    """
    return _run(state, params, average, sample, skip_nonfinite, donate=True)


def averaged_with(
    state: TreeT,
    params: PyTree,
    average: optax.GradientTransformationExtraArgs | None = None,
    *,
    sample: Sample = None,
    skip_nonfinite: bool = False,
) -> TreeT:
    """``update_average`` that donates nothing: the old state stays valid.

    It takes the room of a second average. For code that keeps its own averages: it
    decides by ``sample`` when a model enters, and may be traced.

    Args:
      state: see ``update_average``; stays as it is.
      params: see ``update_average``.
      average: see ``update_average``.
      sample: see ``update_average``.
      skip_nonfinite: see ``update_average``.

    Returns:
      The new state.

    Raises:
      TypeError, RuntimeError, ValueError: see ``update_average``.

    Example:
      >>> import jax, jax.numpy as jnp, swa_jax
      >>> before = swa_jax.init_average(jnp.zeros(2))
      >>> def step(state, t):
      ...     params = jnp.array([1.0, 2.0]) * t
      ...     return swa_jax.averaged_with(state, params, sample=t % 2 == 0), None
      >>> after, _ = jax.lax.scan(step, before, jnp.arange(5.0))  # averages 0, 2, 4
      >>> print(after.avg_params, after.num_averaged, after.num_updates)
      [2. 4.] 3 5
      >>> print(before.num_averaged)
      0
    """
    return _run(state, params, average, sample, skip_nonfinite, donate=False)


def plan_of(average: Any, caller: str) -> _engine.Plan:
    """The plan of one of our transformations, or an error that says so."""
    if isinstance(average, _engine.Average):
        return average.plan
    raise TypeError(
        f"{caller}: average must be one of swa_jax's transformations, such as "
        f"swa_jax.ema(0.999), got {shown(average)}; a chain around it does not tell "
        "which average is meant"
    )


def _run(
    state: Any,
    params: PyTree,
    average: Any,
    sample: Any,
    skip_nonfinite: bool,
    *,
    donate: bool,
) -> Any:
    if average is None:
        average = _equal_mean(isinstance(state, CompensatedSWAState))
    plan = plan_of(average, "update_average")
    _engine.check_state(state, plan, caller="update_average")
    # What is left of the plan compares by value. The state says the rest.
    plan = dataclasses.replace(
        plan,
        accumulator_dtype=None,
        sharding=None,
        skip_nonfinite=bool(plan.skip_nonfinite or skip_nonfinite),
    )
    sample = check_sample(sample, caller="update_average")
    words, leaves = words_of(state), jax.tree.leaves(params)
    if len(leaves) > len(words):
        params = weights_of(params, models_like(plan.kind, state))
        leaves = jax.tree.leaves(params)
    targets = None  # as always in a loop, so this is quick
    if not together(words, leaves):
        leaves = list(map(unwrapped, leaves))
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
        like = models_like(plan.kind, state)
        check_params(params, like, caller="update_average")
        words, leaves, targets = meet(words, leaves)
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
        state = with_words(state, words)
    if is_scattered(words):
        sample = as_array(True) if sample is None else sample
        new = _next_state(state, params, targets, sample, plan)
        for x in jax.tree.leaves(state) if donate else ():
            x.delete()
        return new
    if words:
        scalars = (state.num_updates, state.num_averaged, sample)
        scalars = jax.tree.map(lambda x: follow(x, words[0][0]), scalars)
        state = with_counters(state, *scalars[:2])
        sample = scalars[2]
    if not _engine.is_hashable(plan):
        return _next_state(state, params, targets, sample, plan)
    update = _update_in_place if donate else _update
    return update(state, params, targets, sample, plan)


@functools.cache
def _equal_mean(compensated: bool) -> optax.GradientTransformationExtraArgs:
    return swa(compensated=compensated)


def _next_state(
    state: Any,
    params: PyTree,
    targets: Targets | None,
    sample: jax.Array | None,
    plan: _engine.Plan,
) -> Any:
    # While tracing, so that it costs nothing from the second call on.
    like = models_like(plan.kind, state)
    check_params(params, like, caller="update_average")
    return _engine.next_state(plan, state, params, sample, targets=targets)


_update = jax.jit(_next_state, static_argnums=(2, 4))
_update_in_place = jax.jit(_next_state, static_argnums=(2, 4), donate_argnums=0)
