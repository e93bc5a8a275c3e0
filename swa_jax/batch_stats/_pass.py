"""The pass over the data: batch by batch, each judged before it counts.

What a batch says comes to the host, where everything is float64 and exact: which leaves
it moved, by what share, and its own statistics. It comes a batch late, so that the
devices need not wait for the host. The first batch is run twice, the second time from
old values of the size of its own statistics.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.batch_stats import _forward as forward
from swa_jax.batch_stats._batches import check_batches, weights_of
from swa_jax.batch_stats._checks import (
    check_arrays,
    check_concrete,
    check_like,
    mapped_devices,
    without_device_axis,
)
from swa_jax.batch_stats._forward import Layout, Outputs
from swa_jax.batch_stats._judge import Judge, Verdict, flat
from swa_jax.batch_stats._leaves import Name, find_partners, kept_leaves, some
from swa_jax.batch_stats._place import placed_like, send, to_device, to_host
from swa_jax.batch_stats._share import Segments, places
from swa_jax.batch_stats._totals import Totals
from swa_jax.typing import BatchStatsFn, BatchWeight, Keep, Mode, PyTree, TreeT

#: Runs of one batch until it is known which leaves it moves, and how large they are.
_TRIES = 8


def recompute_batch_stats(
    batch_stats_fn: BatchStatsFn,
    params: PyTree,
    batch_stats: TreeT,
    batches: Iterable[PyTree],
    *,
    mode: Mode = "pooled",
    axis_name: str | None = None,
    keep: Keep = None,
    pairs: Mapping[str, str] | None = None,
    batch_weight: BatchWeight | None = None,
) -> TreeT:
    """Computes the normalisation statistics of ``params`` over ``batches``.

    With ``m_b, v_b`` the mean and variance that the model finds in batch ``b``, the
    result is, by ``mode``::

        "pooled"           mean = sum_b w_b m_b
                           var  = sum_b w_b v_b + sum_b w_b (m_b - mean)**2
        "sample_weighted"  mean = sum_b w_b m_b,    var = sum_b w_b v_b
        "equal_weighted"   the same, with w_b = 1 / number of batches

    where ``w_b`` is the batch's share of all examples that passed through the layer.
    ``"pooled"`` is the statistic of the whole data set for a layer whose input depends
    on no other normalisation, also with a smaller last batch; ``"sample_weighted"`` is
    the rule of the SWA authors' code, ``"equal_weighted"`` that of
    ``torch.optim.swa_utils.update_bn``.

    The model need not be known, nor its momentum: a running statistic obeys ``new = a *
    old + (1 - a) * batch``, and ``a`` is found from what comes out for several old
    values, in every batch and for every leaf. So ``a`` may change (counters, warm-up,
    cumulative averages, a first batch that replaces), and a batch may pass a layer by.
    Whether the formula holds is checked in the same way: each leaf comes out right, is
    kept, or the call raises. A leaf that no batch moved (a frozen layer, a head that
    was never used) keeps its value, and a warning names it.

    The cost is one training-mode forward pass over ``batches`` and one more over the
    first of them, compiled once for each shape of batch. Only what the statistics
    depend on is computed: no head, no loss. The inputs are left untouched. What was
    compiled lives as long as ``batch_stats_fn`` does.

    Args:
      batch_stats_fn: ``(params, batch_stats, batch) -> batch_stats``, one forward pass
        in training mode that returns the updated running statistics. It is traced,
        and compiled anew for every new function object. For Flax::

            def batch_stats_fn(params, batch_stats, batch):
                _, updated = model.apply(
                    {"params": params, "batch_stats": batch_stats},
                    batch["image"], train=True, mutable=["batch_stats"])
                return updated["batch_stats"]

      params: the weights to compute statistics for, such as ``swa_params(...)``.
      batch_stats: running statistics as the model holds them, for structure, shapes
        and dtypes. The values of floating leaves matter only where the forward pass
        does not update them. Leaves of other dtypes (counters) keep what the last batch
        made of them.
      batches: the data, each batch a pytree of arrays that have the examples along
        their leading axis (scalars and PRNG keys aside). Sharded over devices, the
        statistics are global all the same.
      mode: how batches are combined, see above.
      axis_name: name of a ``jax.pmap`` axis, if the pass is to run under ``pmap``.
        Then params, batch_stats and batches carry its leading device axis, and every
        device ends with the statistics over all of them.
      keep: leaves that are to stay as they are, also where the model updates them: a
        name such as ``"BatchNorm_0"`` or ``"BatchNorm_0/mean"``, several names, or a
        function from a leaf's whole name to bool.
      pairs: for ``"pooled"``, own names of variances with those of their means, as in
        ``{"sigma2": "mu"}``, or ``{"1": "0"}`` in a tuple; whole names, as in
        ``{"norm/var_ema/hidden": "norm/mean_ema/hidden"}``, where parents differ.
        Known are ``var`` and ``mean``, ``running_var`` and ``running_mean``,
        ``moving_variance`` and ``moving_mean``, ``var_ema`` and ``mean_ema``, under one
        parent and of one shape. Any other leaf is averaged like a mean; a warning names
        those that might be variances.
      batch_weight: how much a batch counts, a function from the batch to a positive
        number (its valid rows, its tokens); by default the number of its examples. With
        ``axis_name`` also one number a device.

    Returns:
      Statistics like ``batch_stats``. Without any leaf in it, ``batch_stats`` itself:
      ``batches`` is not read.

    Raises:
      ValueError: unknown ``mode``; no batches; a batch without arrays, or with arrays
        of several lengths; a ``batch_stats_fn`` that returns another structure, leaves
        every leaf as it was (evaluation mode), or has a leaf that is no running average
        of the batch alone; an ``a`` that has been rounded so much that ``1 - a`` is not
        known to 1e-5 (float32; 1e-9 in float64, 1e-3 in narrower dtypes).
      NonFiniteError: (a ValueError) a NaN or an infinity in a batch's statistics.
      TypeError: ``batches`` is one array, one batch or a function; a leaf of params or
        batch_stats that is no array; a call under ``jax.jit``.

    Note:
      One thing ``a`` cannot tell. A Python momentum of 0.9999 leaves the batch a share
      of 1e-4 (Flax subtracts before it rounds), one that was rounded to float32 first a
      share of 1.00017e-4. Both have the same ``a``, and where a short decimal fits it
      is taken for the first: the other comes out 1.7e-4 too large at 0.9999, 1.4e-3 at
      0.99999. Averages from 1 - 1/n or of a power of two are recognised as well.

      Of a model that updates one leaf several times in a call (a layer that is used
      twice, micro-batches in a scan) the pass sees what they come to: the later ones
      weigh more, and a variance lacks the spread between them. Give the parts as
      batches of their own where that matters.

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
    if not callable(batch_stats_fn):
        raise TypeError(
            "batch_stats_fn must be a function (params, batch_stats, batch) -> "
            f"batch_stats, got {type(batch_stats_fn).__name__}"
        )
    if batch_weight is not None and mode == "equal_weighted":
        raise ValueError(
            "batch_weight has no meaning with mode='equal_weighted', where every batch "
            "counts the same; leave one of them out"
        )
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    check_batches(batches)
    run = _Pass(batch_stats_fn, params, batch_stats, axis_name, keep)
    names = [run.names[i] for i in run.eligible]
    partners = find_partners(names, [run.shape(i) for i in run.eligible], pairs)
    run.totals = Totals(run.at, partners.mean_of if mode == "pooled" else {})
    for batch in batches:
        weights = weights_of(batch, run.devices, batch_weight)
        run.add(batch, weights if mode != "equal_weighted" else np.ones_like(weights))
    result = run.finish()
    if mode == "pooled":
        _say_what_is_single(run.totals, names, partners.single)
    return result


def _say_what_is_single(totals: Totals, names: list[Name], single: set[int]) -> None:
    """Warns of leaves that might be variances and were averaged like means."""
    pairs = totals.mean_of.items()
    # The mean of a variance may have been frozen, or have missed some batches.
    apart = {v for v, mean in pairs if totals.batches[v] != totals.batches[mean]}
    unsure = [
        names[i]
        for i in sorted(single | apart)
        # One batch has no spread between batches, and no variance is negative.
        if totals.batches[i] > 1 and totals.least[i] >= 0
    ]
    if unsure:
        warnings.warn(
            "recompute_batch_stats: mode='pooled' found no mean that belongs to "
            f"{some(unsure)}; if these are variances, the spread between batches is "
            "missing in them: name their means, by own or whole names, with "
            "pairs={'variance': 'mean'}. If not, they are right; "
            "mode='sample_weighted' says that this is meant",
            stacklevel=3,
        )


class _Run(NamedTuple):
    """One batch, run and not yet judged."""

    number: int  # from 0
    batch: PyTree
    weights: np.ndarray  # on the devices of this process
    leaves: list[jax.Array]  # of batch_stats, before
    layout: Layout
    outputs: Outputs
    moved: Callable[[], list[np.ndarray]]  # of the outputs, on the host

    @property
    def which(self) -> str:
        """What to call the batch in a message."""
        return f"batch {self.number + 1}" if self.number else "the first batch"


class _Pass:
    """A pass under way."""

    totals: Totals
    layout: Layout
    judge: Judge
    known: Verdict  # of the last run from all old values
    wider: list[Any]  # for each leaf, the dtype that the model computes it in
    fed: list[Any]  # for each leaf, the dtype that it is fed in
    device_sizes: list[jax.Array]  # of the moved leaves, where they are used
    stateful: bool  # whether anything but its old value may move a leaf's share

    def __init__(
        self,
        fn: BatchStatsFn,
        params: PyTree,
        batch_stats: PyTree,
        axis_name: str | None,
        keep: Keep,
    ) -> None:
        paths, self.treedef = jax.tree_util.tree_flatten_with_path(batch_stats)
        self.names = [Name.of(path) for path, _ in paths]
        self.given = [leaf for _, leaf in paths]
        check_concrete(params, self.given)
        check_arrays(params=params, batch_stats=batch_stats)
        self.devices = None
        if axis_name is not None:
            self.devices = mapped_devices(axis_name, params, batch_stats)
        self.axis = None if self.devices is None else (axis_name, self.devices)
        self.program = forward.program_of(fn, axis_name)
        self.params = to_device(params)
        self.leaves = [jnp.asarray(x) for x in to_device(self.given)]
        kept = kept_leaves(keep, self.names)
        averaged = [jnp.issubdtype(x.dtype, jnp.inexact) for x in self.leaves]
        others = [i for i in range(len(self.leaves)) if i not in kept]
        #: Leaves to be averaged, as far as the model updates them.
        self.eligible = [i for i in others if averaged[i] and self.leaves[i].size]
        #: Leaves that go on from batch to batch.
        self.carried = [i for i in others if not averaged[i]]
        own = to_host([self.leaves[i] for i in self.eligible])
        self.own = {
            i: x if self.devices else x[None]
            for i, x in zip(self.eligible, own, strict=True)
        }
        vectors = {i: flat([x], 1) for i, x in self.own.items()}
        self.at = Segments.of([x.shape[1] for x in vectors.values()])
        #: Positive values of the leaves' own size: at first, as far as they tell.
        self.sizes = {i: _sizes(x) for i, x in vectors.items()}
        self.measured: set[int] = set()  # whose sizes are those of a batch
        self.huge: set[int] = set()  # of statistics next to which little is far above
        self.sparse = False  # whether most batches are run from 0 alone
        self.number = 0
        self.pending: _Run | None = None
        self.last: _Run | None = None

    def shape(self, leaf: int) -> tuple[int, ...]:
        """A leaf's shape, on one device."""
        return self.own[leaf].shape[1:]

    def add(self, batch: PyTree, weights: np.ndarray) -> None:
        """Runs one more batch, and counts the one before."""
        check_concrete(batch)
        batch = to_device(batch)
        if not self.number:
            self._begin(batch)
        run = self._run(self.number, batch, weights, self.leaves)
        self.number += 1
        rest = self._rest(run)
        self.leaves = [
            rest[i] if i in self.carried and i in rest else x
            for i, x in enumerate(self.leaves)
        ]
        if self.pending is not None:
            self._count(self.pending)
        self.pending = run
        if not run.number:
            self._flush()

    def finish(self) -> PyTree:
        """The result, in the dtypes and places of what was given."""
        if not self.number:
            raise ValueError(
                "batches is empty, so there are no statistics to compute; pass at "
                "least one batch (a generator that was read before is empty: make a "
                "new one)"
            )
        self._flush()
        if self.sparse and self.last is not None and not self.last.layout.full:
            self._settle(self._again(self.last, full=True))
        result = list(self.given)
        for i in self.carried:
            result[i] = self.leaves[i]
        idle = []
        for place, i in enumerate(self.eligible):
            if not self.totals.batches[place]:
                idle.append(self.names[i])
                continue
            values = self.totals.values[self.at.slice(place)]
            result[i] = self._placed(values, i, self.leaves[i].dtype)
        if idle:
            warnings.warn(
                f"recompute_batch_stats: no batch passed through {some(idle)}, which "
                "stay as they were; name leaves for which this is meant in keep=",
                stacklevel=3,
            )
        return jax.tree.unflatten(self.treedef, result)

    # One batch.

    def _begin(self, batch: PyTree) -> None:
        """Looks at the model, and decides how to run it."""
        look = self._look(batch, self.leaves)
        check_like(
            look.new, jax.tree.unflatten(self.treedef, self._shapes(self.leaves))
        )
        self.wider = self.fed = [x.dtype for x in self.leaves]
        floats = [(i, x) for i, x in enumerate(self.leaves) if i in self.own]
        narrow = {i for i, x in floats if jnp.finfo(x.dtype).bits < 32}
        if narrow:
            fed = [
                jax.ShapeDtypeStruct(x.shape, jnp.float32) if i in narrow else x
                for i, x in enumerate(self._shapes(self.leaves))
            ]
            try:
                new = jax.tree.leaves(self._look(batch, fed, shapes=True).new)
            except Exception:  # the model may raise what it likes: it is not for wider
                new = []
            if new:
                self.fed = [x.dtype for x in fed]
                self.wider = [x.dtype for x in new]
        self.stateful = not set(self.carried) <= look.handed_through
        self._move({i for i in self.eligible if i not in look.handed_through}, batch)

    def _look(
        self, batch: PyTree, leaves: list[Any], *, shapes: bool = False
    ) -> forward.Look:
        if not shapes:
            leaves = self._shapes(leaves)
        batch_stats = jax.tree.unflatten(self.treedef, leaves)
        arguments = self._shapes(self.params), batch_stats, self._shapes(batch)
        try:
            return forward.look_at(self.program, self.axis, *arguments)
        except NameError as error:
            if "axis name" not in str(error):
                raise
            raise ValueError(
                "batch_stats_fn communicates along a mapped axis that is not there: "
                f"{str(error).rstrip('.')}. Pass axis_name= of that pmap, with params, "
                "batch_stats and batches stacked for its devices; or, for batches "
                "alone that are, wrap the function in jax.vmap(batch_stats_fn, "
                "(None, None, 0), None, axis_name=...); or a model without it: under "
                "jax.jit with sharded batches statistics are global anyway"
            ) from error

    def _shapes(self, tree: PyTree) -> PyTree:
        return tree if self.devices is None else without_device_axis(tree)

    def _move(self, moved: set[int], batch: PyTree) -> None:
        """Sets which leaves are run from several old values."""
        order = tuple(sorted(moved))
        far = tuple(_far(i in self.huge, self.fed[i], self.wider[i]) for i in order)
        fed = tuple(self.fed[i] for i in order)
        layout = Layout(self.treedef, order, fed, far)
        if not order:
            self.layout, self.device_sizes = layout, []
            return
        self.judge = Judge(
            layout,
            [self.names[i] for i in order],
            [self.leaves[i].dtype for i in order],
            [self.wider[i] for i in order],
            [self.own[i].astype(self.fed[i]) for i in order],
        )
        self._resize(layout)
        shapes = map(self._shapes, (self.params, self.leaves, self.device_sizes))
        arguments = *shapes, self._weight(np.ones(1), mapped=False), self._shapes(batch)
        merged = forward.is_merged(self.program, (self.axis, layout), *arguments)
        self.layout = layout._replace(merged=merged)

    def _resize(self, layout: Layout) -> None:
        """Puts the sizes of the moved leaves where they are used."""
        dtypes = dict(zip(layout.moved, layout.dtypes, strict=True))
        self.device_sizes = [
            self._placed(self.sizes[i], i, d) for i, d in dtypes.items()
        ]
        sizes = to_host(self.device_sizes)
        self.judge.resize(flat([x if self.devices else x[None] for x in sizes], 1)[0])

    @np.errstate(all="ignore")
    def _placed(self, values: np.ndarray, leaf: int, dtype: Any) -> jax.Array:
        """Elements as a leaf, with the device axis if there is one."""
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values.reshape(-1, 2) @ np.array([1, 1j])
        value = values.reshape(self.shape(leaf)).astype(dtype)
        if self.devices:
            value = np.broadcast_to(value, (self.devices, *value.shape))
        run = self.last and next(iter(self.last.outputs.moved), None)
        return placed_like(value, self.given[leaf], run)

    def _weight(self, weights: np.ndarray, *, mapped: bool) -> jax.Array | None:
        if self.axis is None:
            return None
        return jax.device_put(np.float32(weights if mapped else weights[0]))

    def _run(
        self,
        number: int,
        batch: PyTree,
        weights: np.ndarray,
        leaves: list[jax.Array],
        *,
        full: bool = False,
    ) -> _Run:
        layout = self.layout._replace(full=full or not self.sparse)
        weight = self._weight(weights, mapped=True)
        outputs = self.program.run(
            layout, self.params, leaves, self.device_sizes, weight, batch
        )
        moved = send(outputs.moved)
        return _Run(number, batch, weights, leaves, layout, outputs, moved)

    def _again(self, run: _Run, *, full: bool = False) -> _Run:
        return self._run(run.number, run.batch, run.weights, run.leaves, full=full)

    def _rest(self, run: _Run) -> dict[int, jax.Array]:
        """The leaves that were not moved, after the batch."""
        places = (i for i in range(len(self.leaves)) if i not in run.layout.moved)
        return dict(zip(places, run.outputs.rest, strict=True))

    def _flush(self) -> None:
        if self.pending is not None:
            self._count(self.pending)
        self.pending = None

    def _count(self, run: _Run) -> None:
        """Judges a batch and adds it to the totals."""
        run, verdict = self._settle(run)
        order = np.searchsorted(self.eligible, run.layout.moved)
        for device, weight in enumerate(self._weights(run)):
            touched = np.zeros(len(self.eligible), bool)
            values = np.zeros_like(self.totals.values)
            for place, e in enumerate(order):
                touched[e] = verdict.touched[device, place]
                part = self.judge.at.slice(place)
                values[self.at.slice(e)] = verdict.values[device, part]
            if weight:
                self.totals.add(values, touched, float(weight))
        if not run.number:
            self._check_training_mode(run)
            self.sparse = not run.layout.merged and not self.stateful
        # Kept: one batch less in memory where it is not run again.
        self.last = run if self.sparse else run._replace(batch=None, leaves=[])

    def _weights(self, run: _Run) -> np.ndarray:
        """The weights of a batch on all devices of the axis."""
        gathered = run.outputs.everywhere
        return _first_shard(gathered[0]) if gathered else run.weights

    def _settle(self, run: _Run) -> tuple[_Run, Verdict]:
        """Runs a batch again until it is known what it moves, and judges it.

        Raises:
          ValueError: a leaf cannot be believed.
        """
        removed: set[int] = set()
        changed, idle = set[int](), set[int]()
        for _ in range(_TRIES):
            if run.layout.moved != self.layout.moved:
                run = self._again(run)
            moved = run.layout.moved
            changed = self._changed(run)
            if changed & removed:
                break  # idle from 0 and from far above, and yet not from its own values
            if changed:
                self._move({*moved, *changed}, run.batch)
                continue
            verdict = self._verdict(run)
            if verdict is None:
                run = self._again(run, full=True)
                continue
            idle = {
                i
                for i, at_all in zip(moved, verdict.touched.T, strict=True)
                if not at_all.any()
            }
            huge = self._huge(verdict, run.layout) if verdict.trouble else set()
            if huge - self.huge:
                self.huge |= huge
                self._move({*moved}, run.batch)
                run = self._again(run, full=True)
                continue
            if verdict.trouble and idle:
                # A frozen layer, run from 0, spoils what comes after it.
                removed |= idle
                self._move({*moved} - idle, run.batch)
                continue
            if verdict.trouble:
                raise verdict.trouble[min(verdict.trouble)]
            if {*moved} - idle <= self.measured:
                return run, verdict
            for place, i in enumerate(moved):
                if i not in idle:
                    found = np.abs(verdict.values[:, self.judge.at.slice(place)])
                    self.sizes[i] = _sizes(found)
                    self.measured.add(i)
            self._resize(self.layout)
            run = self._again(run, full=True)
        raise ValueError(
            f"batch_stats_fn: it cannot be told which leaves {run.which} updates, "
            "since that changes with the old statistics, as where an outlier is left "
            f"out: see {some(self.names[i] for i in sorted(changed | idle))}; name "
            "leaves that are to stay as they are in keep="
        )

    def _huge(self, verdict: Verdict, layout: Layout) -> set[int]:
        """Leaves whose statistics the old value far above is not far above."""
        largest = [np.max(np.abs(verdict.terms[:, part])) for part in self._parts()]
        far = zip(layout.moved, layout.far, largest, strict=True)
        return {i for i, start, term in far if start / 2**30 < term < np.inf}

    def _parts(self) -> list[slice]:
        return [self.judge.at.slice(place) for place in range(len(self.judge.names))]

    def _changed(self, run: _Run) -> set[int]:
        """Leaves that were not moved and yet came back with another value."""
        rest = {i: x for i, x in self._rest(run).items() if i in self.own}
        new = zip(rest, to_host(list(rest.values())), strict=True)
        return {
            i
            for i, x in new
            if not np.array_equal(x.reshape(self.own[i].shape), self.own[i], True)
        }

    def _verdict(self, run: _Run) -> Verdict | None:
        """What a run says; ``None`` if that takes a run from all old values."""
        if not run.layout.moved:
            nothing = np.zeros((len(run.weights), 0))
            return Verdict(nothing, nothing, nothing, nothing, {})
        fetched = run.moved()
        local = flat(fetched if self.devices else [x[None] for x in fetched], 2)
        everywhere = local[:, :2]
        if self.axis is not None:
            everywhere = flat(list(map(_first_shard, run.outputs.everywhere[1:])), 2)
        if run.layout.full:
            here, there = run.weights > 0, self._weights(run) > 0
            verdict = self.judge.judge(local, everywhere, here, there, run.which)
            if self.sparse and not verdict.trouble:
                self._check_share_held(verdict, run)
            self.known = verdict
            return verdict
        return self.judge.judge_briefly(everywhere[:, 0], self.known)

    def _check_share_held(self, verdict: Verdict, run: _Run) -> None:
        both = verdict.touched & self.known.touched
        off = np.abs(verdict.share - self.known.share) > 1e-9 * verdict.share
        for place in places(np.any(both & off, axis=0)):
            name = self.names[run.layout.moved[place]]
            raise ValueError(
                f"batch_stats_fn: {name.path} is not a running average with one share "
                f"of the batch: it was {self.known.share[:, place].max():.6g} in an "
                f"earlier batch and is {verdict.share[:, place].max():.6g} in "
                f"{run.which}, and nothing among batch_stats tells why. Leave it as it "
                f"is with keep={name.short!r}"
            )

    def _check_training_mode(self, run: _Run) -> None:
        """Raises if the first batch left every leaf as it was."""
        if self.totals.batches.any() or not self.eligible:
            return
        rest = self._rest(run)
        carried = [
            i
            for i in self.carried
            if not jnp.issubdtype(self.leaves[i].dtype, jax.dtypes.extended)
        ]
        new, old = to_host([rest[i] for i in carried]), [run.leaves[i] for i in carried]
        if all(map(np.array_equal, new, to_host(old))):
            raise ValueError(
                "batch_stats_fn returned batch_stats unchanged: it must run the model "
                "in training mode (in Flax, train=True or use_running_average=False, "
                "with mutable=['batch_stats']) and return the updated statistics"
            )


@np.errstate(all="ignore")
def _sizes(values: np.ndarray) -> np.ndarray:
    """Magnitudes, the largest over the leading axis, none much below the others."""
    size = np.max(np.abs(values), 0)
    largest = size.max(where=np.isfinite(size), initial=0) or 1.0
    return np.clip(np.where(np.isfinite(size), size, largest), largest / 16, None)


def _far(huge: bool, *dtypes: Any) -> float:
    """A power of two far above statistics, which all of the dtypes can hold.

    With room above it for sums of many, but not above huge statistics.
    """
    exponent = min(int(jnp.finfo(dtype).maxexp) for dtype in dtypes)
    return 2.0 ** (exponent - 2 if huge or exponent < 100 else exponent * 5 // 8)


def _first_shard(x: jax.Array) -> np.ndarray:
    """What was gathered along a mapped axis: the same on each of its devices."""
    return np.asarray(jax.device_get(x.addressable_data(0))).reshape(x.shape[1:])
