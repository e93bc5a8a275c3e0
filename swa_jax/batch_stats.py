"""Batch-normalisation statistics for weights that never ran in training mode.

Averaged weights see activations that no training step saw, so the running statistics
that training left behind do not fit them. One training-mode pass over the data gives
the ones that do. The pass needs to know neither the model nor its momentum: started
from zeros, running statistics come out as the batch's own times a factor that
``running_average`` recovers from the first batch.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.running_average import (
    LINE_POINT,
    batch_share,
    far_above,
    probe_row,
    wide,
)

PyTree: TypeAlias = Any
BatchStatsFn: TypeAlias = Callable[[PyTree, PyTree, PyTree], PyTree]
Mode = Literal["pooled", "sample_weighted", "equal_weighted"]


def recompute_batch_stats(
    batch_stats_fn: BatchStatsFn,
    params: PyTree,
    batch_stats: PyTree,
    batches: Iterable[PyTree],
    *,
    mode: Mode = "pooled",
    axis_name: str | None = None,
) -> PyTree:
    """Computes the normalisation statistics of ``params`` over ``batches``.

    With ``m_b, v_b`` the mean and variance that the model finds in batch ``b``, the
    result is, by ``mode``::

        "pooled"           mean = sum_b w_b m_b
                           var  = sum_b w_b v_b + sum_b w_b (m_b - mean)**2
        "sample_weighted"  mean = sum_b w_b m_b,    var = sum_b w_b v_b
        "equal_weighted"   the same, with w_b = 1 / number of batches

    where ``w_b`` is the batch's share of all examples. ``"pooled"`` is the statistic
    of the whole data set for a layer whose input depends on no other normalisation,
    also with a smaller last batch; ``"sample_weighted"`` is the rule of the SWA
    authors' code, ``"equal_weighted"`` that of ``torch.optim.swa_utils.update_bn``.

    The cost is one training-mode forward pass over ``batches``, compiled once for each
    shape of batch. Only what the statistics depend on is computed: no head, no loss.
    The inputs are left untouched.

    Args:
      batch_stats_fn: ``(params, batch_stats, batch) -> batch_stats``, one forward pass
        in training mode that returns the updated running statistics. It is traced,
        and compiled anew for every new function object: define it once. For Flax::

            def batch_stats_fn(params, batch_stats, batch):
                _, updated = model.apply(
                    {"params": params, "batch_stats": batch_stats},
                    batch["image"], train=True, mutable=["batch_stats"])
                return updated["batch_stats"]

      params: the weights to compute statistics for, such as ``swa_params(...)``.
      batch_stats: running statistics as the model holds them, for structure, shapes
        and dtypes. Their values matter only for leaves that the forward pass does not
        update. A leaf named ``mean`` and one named ``var`` under the same parent
        belong together; any other floating leaf is averaged like a mean. Leaves of
        other dtypes (counters) keep what the last batch made of them.
      batches: the data, each batch a pytree whose first array has the examples along
        its leading axis. Sharded over devices, the statistics are global all the same.
      mode: how batches are combined, see above.
      axis_name: name of a ``jax.pmap`` axis, if the pass is to run under ``pmap``.
        Then params, batch_stats and batches carry its leading device axis, and every
        device ends with the statistics over all of them.

    Returns:
      Statistics like ``batch_stats``. Without any leaf in it, ``batch_stats`` itself:
      ``batches`` is not read.

    Raises:
      ValueError: unknown ``mode``; no batches; a batch without arrays; a
        ``batch_stats_fn`` that returns another structure, leaves every leaf as it was
        (evaluation mode), returns NaN or infinity, or updates a leaf by anything but
        a running average.

    Example:
      >>> import jax.numpy as jnp
      >>> def batch_stats_fn(params, batch_stats, batch):
      ...     x = params * batch
      ...     return {"mean": 0.9 * batch_stats["mean"] + 0.1 * x.mean(),
      ...             "var": 0.9 * batch_stats["var"] + 0.1 * x.var()}
      >>> stats = {"mean": jnp.zeros(()), "var": jnp.ones(())}
      >>> batches = [jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([10.0, 14.0])]
      >>> stats = recompute_batch_stats(batch_stats_fn, 1.0, stats, batches)
      >>> print(f"{stats['mean']:.2f} {stats['var']:.2f}")
      5.00 26.67

    References:
      Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, section 3.2; for
      the update of mean and variance, Chan, Golub and LeVeque, 1983, "Algorithms for
      computing the sample variance".
    """
    if mode not in get_args(Mode):
        raise ValueError(
            f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}"
        )
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    plan: _Plan | None = None
    weight = 0
    compiled = _compiled(axis_name)
    for batch in batches:
        size = _batch_size(batch, axis_name)
        share = size if mode != "equal_weighted" else 1
        weight += share
        if plan is None:
            plan = _plan(
                batch_stats_fn, mode == "pooled", axis_name, params, batch_stats, batch
            )
            kept, _ = plan.split(batch_stats)
            raw, probed = compiled.probe(plan, params, batch_stats, batch)
            divisors = _divisors(plan, np.asarray(probed))
            total = compiled.start(plan, raw, divisors)
        else:
            # On the host and in float64: counts in float32 would stop at 2**24.
            fraction = np.float32(share / weight)
            total = compiled.step(plan, params, kept, batch, divisors, total, fraction)
    if plan is None:
        raise ValueError(
            "batches is empty, so there are no statistics to compute; pass at least "
            "one batch (a generator that was read before is empty: make a new one)"
        )
    return plan.finish(batch_stats, total, divisors)


class _Plan(NamedTuple):
    """What is known before the first batch is computed: static and hashable.

    The leaves of ``batch_stats`` are either active (the forward pass computes them) or
    kept (it hands them through, as a frozen layer does). Active floating leaves are
    running averages; active leaves of other dtypes, such as counters, are carried from
    batch to batch.
    """

    batch_stats_fn: BatchStatsFn
    pooled: bool
    axis_name: str | None
    treedef: Any
    names: tuple[str, ...]  # of all leaves
    active: tuple[int, ...]  # leaf numbers
    averaged: tuple[bool, ...]  # of the active leaves
    dtypes: tuple[Any, ...]  # of the active leaves
    mean_of: tuple[int | None, ...]  # for an active variance, its mean's place there

    def split(self, batch_stats: PyTree) -> tuple[list[Any], list[Any]]:
        """The kept and the active leaves."""
        leaves = jax.tree.leaves(batch_stats)
        kept = [x for i, x in enumerate(leaves) if i not in self.active]
        return kept, [leaves[i] for i in self.active]

    def join(self, kept: list[Any], active: list[Any]) -> PyTree:
        """The inverse of ``split``."""
        sources = iter(kept), iter(active)
        leaves = [next(sources[i in self.active]) for i in range(len(self.names))]
        return jax.tree.unflatten(self.treedef, leaves)

    def forward(
        self, params: PyTree, kept: list[Any], active: list[Any], batch: PyTree
    ) -> list[Any]:
        """The active leaves after one training-mode forward pass."""
        # Compiled apart, the model is traced once for all the calls of a probe; XLA
        # inlines it and merges what the calls share, which is all of the forward pass.
        fn = jax.jit(self.batch_stats_fn)
        new = fn(params, self.join(kept, active), batch)
        leaves = jax.tree.leaves(new)
        return [leaves[i] for i in self.active]

    def finish(self, batch_stats: PyTree, total: list[Any], divisors: Any) -> PyTree:
        """The result, in the dtypes of ``batch_stats``."""
        kept, old = self.split(batch_stats)
        new = [
            before if np.isinf(divisor) else jnp.asarray(after, dtype)
            for before, after, divisor, dtype in zip(
                old, total, divisors, self.dtypes, strict=True
            )
        ]
        return self.join(kept, new)


def _plan(
    batch_stats_fn: BatchStatsFn,
    pooled: bool,
    axis_name: str | None,
    params: PyTree,
    batch_stats: PyTree,
    batch: PyTree,
) -> _Plan:
    """Traces the model once, without computing, to see what it does to each leaf."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(batch_stats)
    active: list[int] = []

    def look(params: PyTree, batch_stats: PyTree, batch: PyTree) -> None:
        new = batch_stats_fn(params, batch_stats, batch)
        _check_like(new, batch_stats)
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(batch_stats), strict=True)
        # A leaf that comes out as the very object that went in was not updated.
        active.extend(
            i for i, (after, before) in enumerate(pairs) if after is not before
        )

    traced = look if axis_name is None else jax.vmap(look, axis_name=axis_name)
    jax.eval_shape(traced, params, batch_stats, batch)
    if not active:
        raise ValueError(
            "batch_stats_fn returned batch_stats unchanged: it must run the model in "
            "training mode (in Flax, train=True or use_running_average=False, with "
            "mutable=['batch_stats']) and return the updated statistics"
        )
    paths = [path for path, _ in flat]
    dtypes = [jnp.asarray(flat[i][1]).dtype for i in active]
    roles = {_role(paths[i]): place for place, i in enumerate(active)}
    means = (roles.get(_mean_role(paths[i])) for i in active)
    return _Plan(
        batch_stats_fn=_hashable(batch_stats_fn),
        pooled=pooled,
        axis_name=axis_name,
        treedef=treedef,
        names=tuple(jax.tree_util.keystr(path) for path in paths),
        active=tuple(active),
        averaged=tuple(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes),
        dtypes=tuple(dtypes),
        mean_of=tuple(means),
    )


def _check_like(new: PyTree, batch_stats: PyTree) -> None:
    got, expected = (
        {
            jax.tree_util.keystr(path): (jnp.shape(leaf), jnp.result_type(leaf))
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (new, batch_stats)
    )
    for name in sorted(got.keys() ^ expected.keys()):
        raise ValueError(
            f"batch_stats_fn must return statistics with the structure of batch_stats; "
            f"leaf {name} is {'missing' if name in expected else 'not expected'}. In "
            "Flax, return updated['batch_stats'], without the model's output"
        )
    for name, (shape, dtype) in expected.items():
        if got[name] != (shape, dtype):
            raise ValueError(
                f"batch_stats_fn must return statistics like batch_stats; leaf {name} "
                f"has shape {got[name][0]} and dtype {got[name][1]}, expected {shape} "
                f"and {dtype}"
            )


def _role(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def _mean_role(path: tuple[Any, ...]) -> tuple[str, ...]:
    """For the path of a ``var`` leaf, where its ``mean`` leaf would be."""
    role = list(_role(path))
    # Flax's nnx puts the name of a Variable's field after the variable's own.
    for place in range(len(role) - 1, -1, -1):
        if role[place] == "var":
            return (*role[:place], "mean", *role[place + 1 :])
    return ()


def _hashable(function: BatchStatsFn) -> BatchStatsFn:
    if isinstance(function, Hashable):
        try:
            hash(function)
        except TypeError:
            pass
        else:
            return function
    return lambda *args: function(*args)


def _batch_size(batch: PyTree, axis_name: str | None) -> int:
    axis = 0 if axis_name is None else 1
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf) > axis:
            size = np.shape(leaf)[axis]
            break
    else:
        raise ValueError(
            f"batches: a batch must hold an array whose axis {axis} counts its "
            f"examples, got {jax.tree.map(np.shape, batch)} (shapes)"
        )
    if size == 0:
        raise ValueError(
            "batches: a batch must hold at least one example, got an array of shape "
            f"{np.shape(leaf)}; leave empty batches out"
        )
    return size


class _Compiled(NamedTuple):
    probe: Callable[..., Any]
    start: Callable[..., Any]
    step: Callable[..., Any]


@functools.cache
def _compiled(axis_name: str | None) -> _Compiled:
    """The three computations of a pass; JAX keeps what it compiled of them."""
    if axis_name is None:
        return _Compiled(
            probe=jax.jit(_probe, static_argnums=0),
            start=jax.jit(_moments, static_argnums=0),
            step=jax.jit(_step, static_argnums=0, donate_argnums=5),
        )
    pmap = functools.partial(
        jax.pmap, axis_name=axis_name, static_broadcasted_argnums=0
    )
    return _Compiled(
        probe=pmap(_probe),
        start=pmap(_moments, in_axes=(None, 0, None)),
        step=pmap(_step, in_axes=(None, 0, 0, 0, None, 0, None), donate_argnums=5),
    )


def _probe(
    plan: _Plan, params: PyTree, batch_stats: PyTree, batch: PyTree
) -> tuple[list[jax.Array], jax.Array]:
    """Runs the first batch from three old values.

    Returns:
      The active leaves from old value 0, and for each of them its ``probe_row``.
    """
    kept, old = plan.split(batch_stats)

    def run(fraction: float, scales: list[Any]) -> list[jax.Array]:
        starts = [
            jnp.full_like(x, fraction * scale) if averaged else x
            for x, scale, averaged in zip(old, scales, plan.averaged, strict=True)
        ]
        return plan.forward(params, kept, starts, batch)

    at_zero = run(0, [0] * len(old))
    scales = [
        far_above(x) if averaged else jnp.zeros([])
        for x, averaged in zip(at_zero, plan.averaged, strict=True)
    ]
    values = zip(at_zero, run(1, scales), run(LINE_POINT, scales), scales, strict=True)
    rows = [
        probe_row(*leaf, axis_name=plan.axis_name) if averaged else jnp.zeros(4)
        for leaf, averaged in zip(values, plan.averaged, strict=True)
    ]
    return at_zero, jnp.stack(rows)


def _divisors(plan: _Plan, probed: np.ndarray) -> np.ndarray:
    """``1 - a`` of each active leaf; infinite for one that keeps its old value."""
    if plan.axis_name is not None:
        probed = probed[0]
    divisors = np.ones(len(plan.active), np.float32)
    for place, row in enumerate(probed):
        if plan.averaged[place]:
            name = f"batch_stats{plan.names[plan.active[place]]}"
            rest = batch_share(row, plan.dtypes[place], name)
            divisors[place] = rest or np.inf
    return divisors


def _step(
    plan: _Plan,
    params: PyTree,
    kept: list[Any],
    batch: PyTree,
    divisors: Any,
    total: list[jax.Array],
    fraction: Any,
) -> list[jax.Array]:
    """Adds one batch, which holds ``fraction`` of all examples seen until then."""
    zeros = [
        jnp.zeros_like(x, dtype=dtype) if averaged else x
        for x, dtype, averaged in zip(total, plan.dtypes, plan.averaged, strict=True)
    ]
    raw = plan.forward(params, kept, zeros, batch)
    new = _moments(plan, raw, divisors)
    # For the union of a set of share 1 - f with mean M and variance V and one of share
    # f with m and v: mean M + f (m - M), variance V + f (v - V) + f (1 - f) (m - M)**2.
    merged = []
    for place, (mean, value) in enumerate(zip(total, new, strict=True)):
        if not plan.averaged[place]:
            merged.append(value)
            continue
        growth = value - mean
        centre = plan.mean_of[place]
        if plan.pooled and centre is not None:
            growth += (1 - fraction) * jnp.square(new[centre] - total[centre])
        merged.append(mean + fraction * growth)
    return merged


def _moments(plan: _Plan, raw: list[jax.Array], divisors: Any) -> list[jax.Array]:
    """The batch's own statistics, over all devices of the axis if there is one."""
    local = [
        x.astype(wide(x.dtype)) / divisors[place] if averaged else jnp.copy(x)
        for place, (x, averaged) in enumerate(zip(raw, plan.averaged, strict=True))
    ]
    if plan.axis_name is None:
        return local
    everywhere = list(local)
    for place in range(len(local)):
        if plan.averaged[place]:
            everywhere[place] = jax.lax.pmean(local[place], plan.axis_name)
    if plan.pooled:
        for place, centre in enumerate(plan.mean_of):
            if centre is not None:
                spread = jnp.square(local[centre] - everywhere[centre])
                everywhere[place] += jax.lax.pmean(spread, plan.axis_name)
    return everywhere
