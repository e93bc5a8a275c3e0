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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding

from swa_jax.checks import (
    check_accumulator_dtype,
    check_params,
    check_sample,
    leaf_dtypes,
    mean_dtype,
)
from swa_jax.compensation import next_pair
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
        if _is_averaged(dtype)
        else optax.MaskedNode()
        for leaf, dtype, target in zip(leaves, dtypes, targets, strict=True)
    ]
    return CompensatedSWAState(average, jax.tree.unflatten(treedef, lows))


# Compiled also where the caller is not: the constants within are then no transfers
# from the host. Inside a trace such functions leave no mark.
_inlined = functools.partial(jax.jit, inline=True)


@_inlined
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
    return _run(_update_in_place, state, params, sample, skip_nonfinite)


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
    return _run(_update, state, params, sample, skip_nonfinite)


def _run(
    update: Callable[..., _StateT],
    state: _StateT,
    params: PyTree,
    sample: Any,
    skip_nonfinite: bool,
) -> _StateT:
    check_state(state, caller="update_average")
    sample = check_sample(sample, caller="update_average")
    params, targets = _meet(state.avg_params, params)
    return update(state, params, targets, sample, bool(skip_nonfinite))


def check_state(state: Any, *, caller: str) -> None:
    """Raises unless ``state`` is an average whose memory is still its own."""
    if not isinstance(state, State):
        raise TypeError(
            f"{caller}: state must be an SWAState, got {type(state).__name__}; "
            "make one with swa_jax.init_average(params)"
        )
    if _is_placed(state.num_updates) and state.num_updates.is_deleted():
        raise RuntimeError(
            f"{caller}: state has been donated to an earlier call, which reused "
            "its memory; go on with the state that that call returned"
        )


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
    return with_num_updates(new, optax.safe_increment(state.num_updates))


_update = jax.jit(_next_state, static_argnums=(2, 4))
_update_in_place = jax.jit(_next_state, static_argnums=(2, 4), donate_argnums=0)


def with_num_updates(state: State, num_updates: jax.Array) -> State:
    """The state with its first counter replaced."""
    if isinstance(state, SWAState):
        return state._replace(num_updates=num_updates)
    average = state.average._replace(num_updates=num_updates)
    return state._replace(average=average)


def accumulate(
    state: State,
    params: PyTree,
    sample: jax.Array | None = None,
    *,
    targets: Targets | None = None,
) -> State:
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
    # Once, not for each of hundreds of leaves: it shows in the time to compile.
    first, count = _count(state.num_averaged)
    landed: list[jax.Array] = []  # new means that are back in host memory

    def advance(words: Words, new: jax.Array, target: Sharding | None) -> Words:
        hosted = is_hosted(words[0])  # also where no target says so
        if hosted and len(landed) >= _IN_FLIGHT:
            words, _ = jax.lax.optimization_barrier((words, landed[-_IN_FLIGHT]))
        words = jax.tree.map(lambda x: to_device(x, target), words)
        # The newcomer moves, never the mean: each device works on its own part.
        new = bring(to_device(new), target) if target else beside(new, words[0])
        words = _enter(words, new, first, count, sample)
        words = jax.tree.map(lambda x: place(x, target), words)
        if hosted and target is None:
            words = jax.tree.map(to_host, words)
        if is_hosted(words[0]):
            landed.append(words[0])
        return words

    words = _words(state)
    targets = targets or (None,) * len(words)
    words = list(map(advance, words, jax.tree.leaves(params), targets))
    count = count if sample is None else jnp.where(sample, count, state.num_averaged)
    return _with_words(state, words, count)


#: What one leaf is averaged in: the mean, and what compensation there is.
Words = tuple[jax.Array, jax.Array | None]


def _words(state: State) -> list[Words]:
    means = jax.tree.leaves(state.avg_params)
    if isinstance(state, SWAState):
        return [(mean, None) for mean in means]
    lows = iter(jax.tree.leaves(state.compensation))
    return [(x, next(lows) if _is_averaged(x.dtype) else None) for x in means]


def _with_words(state: State, words: list[Words], num_averaged: jax.Array) -> State:
    means, lows = zip(*words, strict=True) if words else ((), ())
    average = SWAState(
        num_updates=state.num_updates,
        num_averaged=num_averaged,
        avg_params=jax.tree.unflatten(jax.tree.structure(state.avg_params), means),
    )
    if isinstance(state, SWAState):
        return average
    lowdef = jax.tree.structure(state.compensation)
    kept = [low for low in lows if low is not None]
    return CompensatedSWAState(average, jax.tree.unflatten(lowdef, kept))


def _is_averaged(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


@_inlined
def _count(n: jax.Array) -> tuple[jax.Array, jax.Array]:
    return n == 0, optax.safe_increment(n)


@_inlined
def _enter(
    words: Words,
    new: jax.Array,
    first: jax.Array,
    count: jax.Array,
    sample: jax.Array | None,
) -> Words:
    """The newcomer's effect on one leaf."""
    mean, low = words
    if low is not None:
        return next_pair(mean, low, jnp.asarray(new), first, count, sample)
    if _is_averaged(mean.dtype):
        new = _next_mean(mean, new, first, count)
    elif not jnp.issubdtype(mean.dtype, jax.dtypes.extended):
        new = jnp.asarray(new, mean.dtype)  # not weakly typed, as the mean is not
    return new if sample is None else jnp.where(sample, new, mean), None


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


@_inlined
def all_finite(tree: PyTree) -> jax.Array:
    """Whether a tree is free of NaN and infinity."""
    arrays = map(jnp.asarray, jax.tree.leaves(tree))
    leaves = [x for x in arrays if _is_averaged(x.dtype)]
    parts = [
        y for x in leaves for y in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))
    ]
    # Not in eight bits or fewer, some of which have no zero, no sign or no NaN.
    parts = [y.astype(jnp.float32) if y.dtype.itemsize < 2 else y for y in parts]
    # By the extremes, which NaN passes through: XLA fuses these two into one reading,
    # but stores a byte for every weight for isfinite(x).all().
    extremes = [f(x, initial=0) for x in parts for f in (jnp.max, jnp.min)]
    return functools.reduce(
        jnp.logical_and, map(jnp.isfinite, extremes), jnp.array(True)
    )


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
