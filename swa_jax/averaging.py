"""The running mean of a pytree of weights: its state, its start, its update.

With ``n`` models in the mean, the next one, ``q``, enters as

    mean <- mean + (q - mean) / (n + 1),

which stays at the weights' own scale however many are averaged. Two choices keep it
cheap. The whole step is elementwise, leaf by leaf, and selects with ``where`` instead
of branching: XLA then updates a donated mean in place, whereas a branch that captures
the weights copies all of it. And the mean is kept in float32 when the weights are
narrower, because ``(q - mean) / (n + 1)`` soon falls below the spacing of bfloat16.
From 10**5 models on it falls below that of float32 too: see ``compensation``.
"""

import functools
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from swa_jax.accumulation import accumulate as accumulate
from swa_jax.accumulation import all_finite, inlined
from swa_jax.checks import (
    check_accumulator_dtype,
    check_params,
    check_sample,
    is_averaged,
    leaf_dtypes,
    mean_dtype,
)
from swa_jax.placement import (
    Placement,
    PyTree,
    Targets,
    bring,
    devices_of,
    follow,
    is_placed,
    is_traced,
    on_device,
    place,
    resolve,
)
from swa_jax.state import CompensatedSWAState as CompensatedSWAState
from swa_jax.state import State, Words, check_state, with_counters, with_words, words_of
from swa_jax.state import SWAState as SWAState

_StateT = TypeVar("_StateT", SWAState, CompensatedSWAState)


@overload
def init_average(
    params: PyTree,
    *,
    accumulator_dtype: Any = ...,
    sharding: Placement = ...,
    compensated: Literal[False] = ...,
) -> SWAState: ...
@overload
def init_average(
    params: PyTree,
    *,
    accumulator_dtype: Any = ...,
    sharding: Placement = ...,
    compensated: bool,
) -> Any: ...
def init_average(
    params: PyTree,
    *,
    accumulator_dtype: Any = None,
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
    accumulator_dtype = check_accumulator_dtype(accumulator_dtype)
    leaves, treedef = jax.tree.flatten(params)
    dtypes = [
        mean_dtype(dtype, accumulator_dtype)
        for dtype in leaf_dtypes(params, caller="init_average")
    ]
    means = list(map(_fresh, leaves, dtypes))
    targets = resolve(sharding, jax.tree.unflatten(treedef, means))
    average = SWAState(
        # Two arrays, not one twice: the counters are donated separately.
        num_updates=_zero(),
        num_averaged=_zero(),
        avg_params=jax.tree.unflatten(treedef, map(place, means, targets)),
    )
    if not compensated:
        return average
    # Not zeros, which would be of no place under jit; the first model replaces them.
    lows = [
        place(_fresh(leaf, mean_dtype(dtype, None)), target)
        if is_averaged(dtype)
        else optax.MaskedNode()
        for leaf, dtype, target in zip(leaves, dtypes, targets, strict=True)
    ]
    return CompensatedSWAState(average, jax.tree.unflatten(treedef, lows))


@inlined
def _zero() -> jax.Array:
    return jnp.zeros([], jnp.int32)


def _fresh(leaf: Any, dtype: Any) -> jax.Array:
    """A buffer of its own with the value of ``leaf``, or with zeros for a shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        zeros = functools.partial(jax.lax.full, leaf.shape, 0, dtype)
        return jax.jit(zeros, out_shardings=leaf.sharding)()
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys know no cast
        return jnp.copy(leaf)
    if not isinstance(leaf, jax.Array):
        leaf = jax.device_put(np.asarray(leaf))
    # A dtype given by name also strips weak types, which would retrace the first
    # update; `copy` makes a buffer of its own.
    return jnp.array(leaf, dtype=dtype, copy=True)


def update_average(
    state: _StateT,
    params: PyTree,
    *,
    sample: bool | jax.Array | None = None,
    skip_nonfinite: bool = False,
) -> _StateT:
    """Averages one more model: compiled, and in place.

    The old state is donated: use the returned one from then on. ``params`` stays
    valid. The mean stays in its place, sharded or in host memory, also where
    ``params`` lives elsewhere; each device then updates its own part.

    Args:
      state: from ``init_average`` or an earlier call.
      params: pytree of the structure and shapes that ``init_average`` received.
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
    return _run(state, params, sample, skip_nonfinite, donate=True)


def averaged_with(
    state: _StateT,
    params: PyTree,
    *,
    sample: bool | jax.Array | None = None,
    skip_nonfinite: bool = False,
) -> _StateT:
    """``update_average`` that donates nothing: the old state stays valid.

    It takes the room of a second average. For code that keeps its own averages: it
    decides by ``sample`` when a model enters, and may be traced.

    Args:
      state: see ``update_average``; stays as it is.
      params: see ``update_average``.
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
    return _run(state, params, sample, skip_nonfinite, donate=False)


def _run(
    state: Any, params: PyTree, sample: Any, skip_nonfinite: bool, *, donate: bool
) -> Any:
    check_state(state, caller="update_average")
    sample = check_sample(sample, caller="update_average")
    state, params, targets = _meet(state, params)
    means = jax.tree.leaves(state.avg_params)
    if _scattered(means):
        sample = on_device(np.True_) if sample is None else sample
        new = _next_state(state, params, targets, sample, bool(skip_nonfinite))
        for x in jax.tree.leaves(state) if donate else ():
            x.delete()
        return new
    if means:
        scalars = (state.num_updates, state.num_averaged, sample)
        updates, averaged, sample = jax.tree.map(lambda x: follow(x, means[0]), scalars)
        state = with_counters(state, updates, averaged)
    update = _update_in_place if donate else _update
    return update(state, params, targets, sample, bool(skip_nonfinite))


def _scattered(means: list[Any]) -> bool:
    """Whether leaves live on different devices, which no compiled call spans."""
    alike = {x.sharding: x for x in means if is_placed(x)}
    return len(set(map(devices_of, alike.values()))) > 1


def _next_state(
    state: State,
    params: PyTree,
    targets: Targets | None,
    sample: jax.Array | None,
    skip_nonfinite: bool,
) -> State:
    # While tracing, so that it costs nothing from the second call on.
    check_params(params, state.avg_params, caller="update_average")
    if skip_nonfinite:
        finite = all_finite(params)
        sample = finite if sample is None else sample & finite
    new = accumulate(state, params, targets=targets, sample=sample)
    count = optax.safe_increment(state.num_updates)
    return with_counters(new, count, new.num_averaged)


_update = jax.jit(_next_state, static_argnums=(2, 4))
_update_in_place = jax.jit(_next_state, static_argnums=(2, 4), donate_argnums=0)


def _meet(state: Any, params: PyTree) -> tuple[Any, PyTree, Targets | None]:
    """The weights, moved where they live on other devices than the mean.

    Also where the mean must be held, if the weights would pull it away; and a state
    that was restored to NumPy arrays, moved to its weights.
    """
    means, leaves = jax.tree.leaves(state.avg_params), jax.tree.leaves(params)
    if len(means) == len(leaves) and all(map(_together, means, leaves)):
        return state, params, None  # as always in a loop, so this is quick
    check_params(params, state.avg_params, caller="update_average")
    state = _beside_params(state, leaves)
    means = jax.tree.leaves(state.avg_params)
    moved = list(map(_on_devices_of, means, leaves))
    targets = tuple(map(_own_target, means, moved))
    return state, jax.tree.unflatten(jax.tree.structure(params), moved), targets


def _together(mean: Any, param: Any) -> bool:
    return is_placed(mean) and is_placed(param) and mean.sharding == param.sharding


def _beside_params(state: State, params: list[Any]) -> State:
    """Moves what a checkpoint restored to NumPy arrays; explicitly."""

    def move(words: Words, param: Any) -> Words:
        target = param.sharding if is_placed(param) else None
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, target),
            words,
        )

    return with_words(state, list(map(move, words_of(state), params)))


def _on_devices_of(mean: Any, param: Any) -> Any:
    """Moves a leaf of the weights that lives on other devices than its mean."""
    if not is_placed(mean) or is_traced(param):
        return param
    same = is_placed(param) and devices_of(mean) == devices_of(param)
    return param if same else bring(param, mean.sharding)


def _own_target(mean: Any, param: Any) -> Sharding | None:
    """Where the mean must stay, if the weights would pull it away."""
    if not is_placed(mean) or is_traced(param) or _together(mean, param):
        return None
    return mean.sharding
