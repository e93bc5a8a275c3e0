"""The one place that writes an average: from weights to the next state.

An average is *what* is kept of each leaf (a ``Kind``), *when* a model enters
(a ``Sampling``), and *where* it lives. ``transformation`` makes of these what stands
last in an optimizer's chain; a loop asks ``next_state`` for the same step.

The transformation sees the final updates and passes them through. It averages the
weights *after* the update, computed exactly as the user computes them,
``optax.apply_updates(params, updates)``: inside one compiled step XLA merges the two,
so neither time nor memory is spent twice. Averaging ``params`` as received would lag
one step behind and cost a copy of all weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from swa_jax._leafwise import Buffer, Kind, Scalars, Words
from swa_jax._placement import (
    Targets,
    as_array,
    beside,
    bring,
    follow,
    is_hosted,
    is_placed,
    place,
    resolve,
    stack,
    to_device,
    to_host,
)
from swa_jax._sampling import Sampling
from swa_jax._validate import (
    check_accumulator_dtype,
    check_params,
    is_averaged,
    leaf_dtype,
    leaf_dtypes,
    mean_dtype,
)
from swa_jax.typing import Placement, PyTree

#: Leaves of an average in host memory that may be on the device before the first of
#: them is back. Left alone, XLA brings over all: as if the average had never left.
_IN_FLIGHT = 2

# Compiled also where the caller is not: the constants within are then no transfers
# from the host. Inside a trace such functions leave no mark.
_inlined = functools.partial(jax.jit, inline=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that makes an average what it is.

    Attributes:
      caller: the public function that made it, for messages.
      state: type of its state: two counters, then trees.
      kind: what is kept of each leaf.
      when: which models enter, counted in updates.
      accumulator_dtype: what floating leaves are averaged in; ``None`` for float32 or
        wider.
      sharding: where it lives.
      skip_nonfinite: whether a model with any NaN or infinity is left out.
    """

    caller: str
    state: type[Any]
    kind: Kind
    when: Sampling
    accumulator_dtype: np.dtype | None
    sharding: Placement
    skip_nonfinite: bool


class Average(optax.GradientTransformationExtraArgs):
    """The transformation of an average, from which a loop can read the plan."""

    plan: Plan


def transformation(
    caller: str,
    state: type,
    kind: Kind,
    steps: tuple[Any, Any, Any],
    *,
    accumulator_dtype: DTypeLike | None,
    sharding: Placement,
    skip_nonfinite: bool,
) -> optax.GradientTransformationExtraArgs:
    """What every average's public function returns.

    Args:
      caller: that function's name.
      state: type of the state.
      kind: what is kept of each leaf.
      steps: ``start_step``, ``period`` and ``stop_step``, see ``swa``.
      accumulator_dtype: see ``swa``.
      sharding: see ``swa``.
      skip_nonfinite: see ``swa``.
    """
    plan = Plan(
        caller,
        state,
        kind,
        Sampling.of_updates(*steps),
        check_accumulator_dtype(accumulator_dtype),
        sharding,
        skip_nonfinite,
    )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del extra_args
        return updates, _after_update(plan, updates, state, params)

    average = Average(functools.partial(initial_state, plan), update_fn)
    average.plan = plan
    return average


# The state as leaves.


def trees_of(state: Any) -> tuple[PyTree, ...]:
    """What a state holds besides its counters; the first has all leaves."""
    if hasattr(state, "average"):  # and what the average lacks
        return (*state.average[2:], *state[1:])
    return tuple(state[2:])


def with_trees(
    state: Any, num_updates: jax.Array, num_averaged: jax.Array, trees: Any
) -> Any:
    """A state of the same type with other content."""
    return _build(type(state), num_updates, num_averaged, *trees)


def with_counters(state: Any, num_updates: jax.Array, num_averaged: jax.Array) -> Any:
    """A state with other counters."""
    return with_trees(state, num_updates, num_averaged, trees_of(state))


def words_of(state: Any) -> list[Words]:
    """Leaf by leaf, what a state holds of it."""
    first, *others = trees_of(state)
    leaves = jax.tree.leaves(first)
    treedef: Any = jax.tree.structure(first)
    columns = [map(_word, treedef.flatten_up_to(tree)) for tree in others]
    return list(zip(leaves, *columns, strict=True))


def with_words(state: Any, words: list[Words]) -> Any:
    """A state with other words."""
    trees = _trees(jax.tree.structure(trees_of(state)[0]), words, len(trees_of(state)))
    return with_trees(state, state.num_updates, state.num_averaged, trees)


def _build(state: type, *fields: Any) -> Any:
    # Where the average stands inside a state, its type knows how to be made.
    return getattr(state, "of", state)(*fields)


def _word(leaf: Any) -> Any:
    return None if isinstance(leaf, optax.MaskedNode) else leaf


def _trees(treedef: Any, words: list[Words], number: int) -> list[PyTree]:
    """One tree for each of the ``number`` words of a leaf."""
    columns = list(zip(*words, strict=True)) if words else [()] * number
    return [
        treedef.unflatten(optax.MaskedNode() if x is None else x for x in column)
        for column in columns
    ]


def models_like(kind: Kind, state: Any) -> PyTree:
    """What a model that may enter must look like."""
    first = trees_of(state)[0]
    if kind.buffers(jnp.dtype(jnp.float32), None)[0].rows is None:
        return first
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), first)


# The first state.


def initial_state(plan: Plan, params: PyTree, *, caller: str | None = None) -> Any:
    """An average of no model yet, with the data of ``params``, so where they are."""
    leaves = jax.tree.leaves(params)
    treedef: Any = jax.tree.structure(params)
    dtypes = leaf_dtypes(params, caller=caller or plan.caller)
    kept = [plan.kind.buffers(dtype, plan.accumulator_dtype) for dtype in dtypes]
    specs = [
        jax.ShapeDtypeStruct(np.shape(leaf), buffers[0].dtype)
        for leaf, buffers in zip(leaves, kept, strict=True)
    ]
    targets = resolve(plan.sharding, treedef.unflatten(specs))
    words = [
        tuple(buffer and _fresh(leaf, buffer, target) for buffer in buffers)
        for leaf, buffers, target in zip(leaves, kept, targets, strict=True)
    ]
    number = len(plan.kind.buffers(jnp.dtype(jnp.float32), None))
    counters = _zero(), _zero()  # two arrays: counters are donated separately
    return _build(plan.state, *counters, *_trees(treedef, words, number))


@_inlined
def _zero() -> jax.Array:
    return jnp.zeros([], jnp.int32)


def _fresh(leaf: Any, buffer: Buffer, target: Sharding | None) -> jax.Array:
    """A buffer of its own with the value of ``leaf``, or with zeros for a shape."""
    dtype, rows = buffer
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = leaf.shape if rows is None else (rows, *leaf.shape)
        at = leaf.sharding if rows is None else stack(leaf.sharding)
        zeros = functools.partial(jax.lax.full, shape, 0, dtype)
        return _placed(jax.jit(zeros, out_shardings=at)(), buffer, target)
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys know no cast
        new = jnp.copy(leaf)
    else:
        if not isinstance(leaf, jax.Array):
            leaf = jax.device_put(np.asarray(leaf))
        # A dtype given by name also strips weak types, which would retrace the first
        # update; `copy` makes a buffer of its own.
        new = jnp.array(leaf, dtype=dtype, copy=True)
    if rows is not None:
        # An array that is free to follow others stays so.
        tied = is_placed(new) and new.committed
        at = stack(new.sharding) if tied else None
        new = jax.jit(_repeat, static_argnums=1, out_shardings=at)(new, rows)
    return _placed(new, buffer, target)


def _repeat(x: jax.Array, rows: int) -> jax.Array:
    return jnp.broadcast_to(x, (rows, *x.shape))


def _placed(x: jax.Array, buffer: Buffer, target: Sharding | None) -> jax.Array:
    return place(x, target if buffer.rows is None else stack(target))


# The next one.


def _after_update(plan: Plan, updates: PyTree, state: Any, params: PyTree) -> Any:
    """One optimizer update later."""
    if params is None:
        raise ValueError(
            f"{plan.caller}: update received params=None, but averages the updated "
            "weights; call tx.update(updates, opt_state, params)"
        )
    check_state(state, plan)
    like = models_like(plan.kind, state)

    def kept_as(dtype: Any) -> Any:
        return plan.kind.buffers(dtype, plan.accumulator_dtype)[0].dtype

    check_params(params, like, caller=plan.caller, averaged_as=kept_as)
    new_params = _apply_updates(params, updates, plan.caller)
    targets = resolve(plan.sharding, like)
    return next_state(plan, state, new_params, targets=targets)


def next_state(
    plan: Plan,
    state: Any,
    params: PyTree,
    sample: jax.Array | None = None,
    *,
    targets: Targets | None = None,
) -> Any:
    """One model later, which enters if the plan says so.

    Args:
      plan: the average.
      state: the state before.
      params: the newcomer ``q``, structured like the average.
      sample: bool scalar, whether it may enter; ``None`` means yes.
      targets: where each leaf of the average lives, from ``resolve``; by default
        beside the parameters.
    """
    number, due = plan.when.after(state.num_updates)
    if not plan.when.always:
        sample = due if sample is None else due & follow(sample, due)
    if plan.skip_nonfinite:
        finite = _all_finite(params)
        sample = finite if sample is None else follow(sample, finite) & finite
    new = accumulate(plan.kind, state, params, sample, targets=targets)
    return with_counters(new, number, new.num_averaged)


def accumulate(
    kind: Kind,
    state: Any,
    params: PyTree,
    sample: jax.Array | None = None,
    *,
    targets: Targets | None = None,
) -> Any:
    """``next_state`` of an average that knows no steps; ``num_updates`` stays."""
    count = _next(state.num_averaged)
    landed: list[jax.Array] = []  # what is back in host memory

    scalars_of, enter = _compiled(kind)

    @functools.cache  # once, not for each of hundreds of leaves: it shows in compiling
    def scalars_in(dtype: Any) -> Scalars:
        return scalars_of(count, dtype)

    def advance(words: Words, new: Any, target: Sharding | None) -> Words:
        ndim = np.ndim(new)
        stacked = np.ndim(words[0]) > ndim
        hosted = is_hosted(words[0])  # also where no target says so
        if hosted and len(landed) >= _IN_FLIGHT:
            words, _ = jax.lax.optimization_barrier((words, landed[-_IN_FLIGHT]))
        words = jax.tree.map(lambda x: to_device(x, target), words)
        # The newcomer moves, never the average: each device works on its own part.
        new = to_device(new)
        near = functools.partial(beside, other=words[0], stacked=stacked)
        new = bring(new, target) if target else near(new)
        scalars = scalars_in(_real_dtype(words[0]))
        shared = jax.tree.map(lambda x: follow(x, words[0]), (scalars, sample))
        words = enter(words, new, *shared)
        words = jax.tree.map(
            lambda x: place(x, stack(target) if x.ndim > ndim else target), words
        )
        if hosted and target is None:
            words = jax.tree.map(to_host, words)
        if is_hosted(words[0]):
            landed.append(words[0])
        return words

    words, leaves = words_of(state), jax.tree.leaves(params)
    targets = targets or (None,) * len(words)
    new = with_words(state, list(map(advance, words, leaves, targets)))
    if sample is not None:
        old, count = (follow(x, sample) for x in (state.num_averaged, count))
        count = jnp.where(sample, count, old)
    return with_counters(new, state.num_updates, count)


@_inlined
def _next(n: jax.Array) -> jax.Array:
    return optax.safe_increment(n)


def _compiled(kind: Kind) -> tuple[Callable[..., Scalars], Callable[..., Words]]:
    """Its two functions, compiled where the caller is not."""
    if not is_hashable(kind):  # with values inside a trace, so within one
        return kind.scalars, kind.enter
    return functools.partial(_scalars, kind), functools.partial(_enter, kind)


def is_hashable(x: Any) -> bool:
    """Whether ``x`` can name a compiled program."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


@functools.partial(_inlined, static_argnums=(0, 2))
def _scalars(kind: Kind, count: jax.Array, dtype: Any) -> Scalars:
    return kind.scalars(count, dtype)


@functools.partial(_inlined, static_argnums=0)
def _enter(
    kind: Kind, words: Words, new: jax.Array, scalars: Scalars, sample: Any
) -> Words:
    return kind.enter(words, new, scalars, sample)


def _real_dtype(kept: Any) -> Any:
    """What the scalars for a leaf are computed in."""
    if not is_averaged(kept.dtype):
        return jnp.dtype(jnp.float32)
    return jnp.finfo(mean_dtype(kept.dtype, None)).dtype


# What enters.


def check_state(state: Any, plan: Plan, *, caller: str | None = None) -> None:
    """Raises unless ``state`` is the plan's, and its memory is still its own."""
    name, caller = plan.state.__name__, caller or plan.caller
    if not isinstance(state, plan.state):
        found = type(state).__name__
        fix = "make one with swa_jax.init_average(params, average)"
        if found.endswith("State") and hasattr(state, "num_averaged"):
            fix = "pass the average that the state was made for, as the third argument"
        article = "an" if name[0] in "ES" else "a"  # an SWAState, a LAWAState
        raise TypeError(f"{caller}: state must be {article} {name}, got {found}; {fix}")
    _check_rows(state, plan, caller)
    some = [state.num_updates, *jax.tree.leaves(trees_of(state)[0])[:1]]
    if any(is_placed(x) and x.is_deleted() for x in some):
        raise RuntimeError(
            f"{caller}: state has been donated to an earlier call, which reused "
            "its memory; go on with the state that that call returned"
        )


def _check_rows(state: Any, plan: Plan, caller: str) -> None:
    """Raises if the state's stacks are of another size than the plan's."""
    buffers = plan.kind.buffers(jnp.dtype(jnp.float32), None)
    if all(buffer and buffer.rows is None for buffer in buffers):
        return
    # One leaf tells of all; one that is averaged, for of others less may be kept.
    words = sorted(words_of(state), key=lambda kept: not is_averaged(kept[0].dtype))
    for kept in words[:1]:
        buffers = plan.kind.buffers(kept[0].dtype, None)
        for x, buffer in zip(kept, buffers, strict=True):
            rows = (buffer and buffer.rows) or 0
            found = np.shape(x)[0] if x is not None and (rows or not buffer) else 0
            if found != rows:
                raise ValueError(
                    f"{caller}: the state was made for {plan.caller}({found}), the "
                    f"average is {plan.caller}({rows}); both must keep as many models. "
                    "Fix: go on with the number of before, or begin a new state"
                )


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether a tree is free of NaN and infinity."""
    leaves = (x for x in jax.tree.leaves(tree) if is_averaged(leaf_dtype(x)))
    parts = [_is_finite(as_array(x)) for x in leaves]
    both = lambda x, y: x & follow(y, x)  # noqa: E731
    return functools.reduce(both, parts) if parts else as_array(np.True_)


@_inlined
def _is_finite(x: jax.Array) -> jax.Array:
    # Not in eight bits or fewer, some of which have no zero, no sign or no NaN.
    x = x.astype(jnp.float32) if x.dtype.itemsize < 2 else x
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    # By the extremes, which NaN passes through: XLA fuses these two into one reading,
    # but stores a byte for every weight for isfinite(x).all().
    extremes = [f(part, initial=0) for part in parts for f in (jnp.max, jnp.min)]
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, extremes))


class _MismatchError(ValueError):
    """An update that does not fit its parameter."""


def _apply_updates(params: PyTree, updates: PyTree, caller: str) -> PyTree:
    """``optax.apply_updates``, passing on leaves that no gradient step changes."""

    def apply(path: KeyPath, param: Any, update: Any) -> Any:
        no_gradient = jax.tree.leaves(update) == [] or (
            leaf_dtype(update) == jax.dtypes.float0
        )
        if no_gradient or jnp.issubdtype(leaf_dtype(param), jax.dtypes.extended):
            return as_array(param)
        if np.shape(update) != np.shape(param):
            raise _MismatchError(
                f"{caller}: updates{jax.tree_util.keystr(path)} has shape "
                f"{np.shape(update)}, its parameter has {np.shape(param)}; both must "
                "be the same. Fix: pass the updates and the params of one model"
            )
        new = optax.apply_updates(as_array(param), as_array(update))
        # Of a sum that is stored in bfloat16, XLA would feed the mean the unrounded
        # float32, and keep a copy of the old weights for it. The barrier makes the mean
        # read what is stored. Wider weights are stored as computed.
        narrow = jnp.issubdtype(new.dtype, jnp.floating) and (
            jnp.finfo(new.dtype).bits < 32
        )
        return jax.lax.optimization_barrier(new) if narrow else new

    leaf_dtypes(updates, caller=caller, name="updates")
    try:
        return jax.tree_util.tree_map_with_path(apply, params, updates)
    except _MismatchError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{caller}: updates must have the structure of params. Fix: pass the "
            f"updates and the params of one model; {error}"
        ) from error
