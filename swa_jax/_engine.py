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
from jax.typing import DTypeLike

from swa_jax._inlined import inlined
from swa_jax._leafwise import Kind, Scalars, Words
from swa_jax._newcomer import all_finite, apply_updates, weights_of
from swa_jax._placement import (
    Targets,
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
from swa_jax._states import (
    fresh_state,
    models_like,
    trees_of,
    with_counters,
    with_words,
    words_of,
)
from swa_jax._validate import (
    check_accumulator_dtype,
    check_params,
    is_averaged,
    mean_dtype,
)
from swa_jax.typing import Placement, PyTree

#: Leaves of an average in host memory that may be on the device before the first of
#: them is back. Left alone, XLA brings over all: as if the average had never left.
_IN_FLIGHT = 2


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

    @classmethod
    def of(
        cls, plan: Plan, init_fn: Callable[..., Any], update_fn: Callable[..., Any]
    ) -> "Average":
        """The transformation with its plan."""
        average = cls(init_fn, update_fn)
        average.plan = plan
        return average


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
        return updates, after_update(plan, updates, state, params)

    return Average.of(plan, functools.partial(initial_state, plan), update_fn)


def initial_state(plan: Plan, params: PyTree, *, caller: str | None = None) -> Any:
    """An average of no model yet."""
    return fresh_state(
        plan.state,
        plan.kind,
        params,
        accumulator_dtype=plan.accumulator_dtype,
        sharding=plan.sharding,
        caller=caller or plan.caller,
    )


def after_update(
    plan: Plan, updates: PyTree, state: Any, params: PyTree, batch_stats: PyTree = None
) -> Any:
    """One optimizer update later.

    Args:
      plan: the average.
      updates: as they will be applied.
      state: the state before.
      params: the parameters before.
      batch_stats: the statistics that are averaged along, after the step.
    """
    if params is None:
        raise ValueError(
            f"{plan.caller}: update received params=None, but averages the updated "
            "weights; call tx.update(updates, opt_state, params)"
        )
    check_state(state, plan)
    like = models_like(plan.kind, state)

    def kept_as(dtype: Any) -> Any:
        return plan.kind.buffers(dtype, plan.accumulator_dtype)[0].dtype

    along = batch_stats is not None

    def model(params: PyTree) -> PyTree:
        return {"params": params, "batch_stats": batch_stats} if along else params

    whole = weights_of(model(params), like)
    check_params(whole, like, caller=plan.caller, averaged_as=kept_as)
    params = whole["params"] if along else whole
    new = model(apply_updates(params, updates, plan.caller))
    targets = resolve(plan.sharding, like)
    return next_state(plan, state, new, targets=targets)


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
        finite = all_finite(params)
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


@inlined
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


@functools.partial(inlined, static_argnums=(0, 2))
def _scalars(kind: Kind, count: jax.Array, dtype: Any) -> Scalars:
    return kind.scalars(count, dtype)


@functools.partial(inlined, static_argnums=0)
def _enter(
    kind: Kind, words: Words, new: jax.Array, scalars: Scalars, sample: Any
) -> Words:
    return kind.enter(words, new, scalars, sample)


def _real_dtype(kept: Any) -> Any:
    """What the scalars for a leaf are computed in."""
    if not is_averaged(kept.dtype):
        return jnp.dtype(jnp.float32)
    return jnp.finfo(mean_dtype(kept.dtype, None)).dtype


def check_state(state: Any, plan: Plan, *, caller: str | None = None) -> None:
    """Raises unless ``state`` is the plan's, and its memory is still its own."""
    name, caller = plan.state.__name__, caller or plan.caller
    if not isinstance(state, plan.state):
        found = type(state).__name__
        fix = "make one with swa_jax.init_average(params, average)"
        if found.endswith("State") and hasattr(state, "num_averaged"):
            fix = "pass the average and the state that belong together"
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
