"""Running the model from several old values of its statistics, for the price of one.

``jax.vmap`` over the old values alone does it: what does not depend on them, which is
all of an ordinary forward pass, is not batched and so runs once, also under
``nn.scan``, ``remat``, ``jit`` or a custom VJP. No compiler has to find out.
"""

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax.batch_stats._share import OWN
from swa_jax.typing import BatchStatsFn, PyTree

#: Elementwise operations on each statistic and old value that count as nothing.
_FREE_OPERATIONS = 50


class Layout(NamedTuple):
    """How one batch is run: static and hashable.

    Attributes:
      treedef: of ``batch_stats``.
      moved: numbers of the leaves that are run from several old values; the others are
        fed as they are.
      dtypes: what each moved leaf is fed in; wider than its own where the model takes
        that, since more of its momentum is seen then.
      far: for each moved leaf, the old value far above its statistics.
      merged: whether ``vmap`` leaves the forward pass unbatched; else the old values
        are taken one after the other.
      full: from all old values; else from 0 alone.
    """

    treedef: Any
    moved: tuple[int, ...]
    dtypes: tuple[Any, ...]
    far: tuple[float, ...]
    merged: bool = True
    full: bool = True


class Outputs(NamedTuple):
    """What one run gives, all of it still on the devices.

    Attributes:
      moved: the moved leaves after the batch, the old values along a new leading axis.
      rest: the other leaves after the batch.
      everywhere: with a mapped axis, the weights of its devices, and the moved leaves
        from the first two old values, along one more leading axis; else empty.
    """

    moved: list[jax.Array]
    rest: list[jax.Array]
    everywhere: list[jax.Array]


class Program(NamedTuple):
    """A model, compiled in whatever layouts it is run.

    Attributes:
      model: ``(params, batch_stats, batch)``: the model itself, under ``jax.jit``.
      run: ``(layout, params, leaves, sizes, weight, batch) -> Outputs``, with all
        leaves of ``batch_stats``, for each moved one positive values of its statistics'
        own size, and the weight of the batch. Under ``pmap`` if there is an axis.
      unmapped: ``run`` without ``jit`` or ``pmap``.
      seen: what ``look_at`` and ``is_merged`` found, for the next call.
    """

    model: Callable[..., PyTree]
    run: Callable[..., Outputs]
    unmapped: Callable[..., Outputs]
    seen: dict[Any, Any]


_programs: weakref.WeakKeyDictionary[Any, dict[str | None, Program]] = (
    weakref.WeakKeyDictionary()
)


def program_of(fn: BatchStatsFn, axis_name: str | None) -> Program:
    """The program of a model: made once, and gone as soon as the model is."""
    try:
        made = _programs.setdefault(fn, {})
    except TypeError:  # it cannot be hashed, or not referred to weakly
        return _make_program(lambda: fn, axis_name)
    if axis_name not in made:
        # What the dictionary holds must not keep its key alive.
        made[axis_name] = _make_program(weakref.ref(fn), axis_name)
    return made[axis_name]


def _make_program(find: Callable[[], Any], axis_name: str | None) -> Program:
    def batch_stats_fn(params: PyTree, batch_stats: PyTree, batch: PyTree) -> PyTree:
        return find()(params, batch_stats, batch)

    # Under jit of its own, the model is traced once for all that is made of it.
    model = jax.jit(batch_stats_fn)
    run = functools.partial(_run, model, axis_name)
    if axis_name is None:
        return Program(model, jax.jit(run, static_argnums=0), run, {})
    mapped = jax.pmap(run, axis_name=axis_name, static_broadcasted_argnums=0)
    return Program(model, mapped, run, {})


def _run(
    model: Callable[..., PyTree],
    axis_name: str | None,
    layout: Layout,
    params: PyTree,
    leaves: list[jax.Array],
    sizes: list[jax.Array],
    weight: jax.Array,
    batch: PyTree,
) -> Outputs:
    def forward(old: list[jax.Array]) -> list[jax.Array]:
        filled = list(leaves)
        for place, value in zip(layout.moved, old, strict=True):
            filled[place] = value
        new = model(params, jax.tree.unflatten(layout.treedef, filled), batch)
        return jax.tree.leaves(new)

    if not layout.moved:
        return Outputs([], forward([]), [])
    fed = zip(layout.moved, layout.dtypes, strict=True)
    starts = [leaves[place].astype(dtype) for place, dtype in fed]
    if layout.full:
        codes = old_value_codes(len(starts))
        rows = list(map(_old_values, starts, sizes, layout.far, codes))
    else:
        rows = [jnp.zeros_like(x)[None] for x in starts]
    several = jax.vmap if layout.merged else _one_after_the_other
    new = several(forward)(rows)
    moved = [new[place] for place in layout.moved]
    own = OWN if layout.full else 0
    rest = [x[own] for place, x in enumerate(new) if place not in layout.moved]
    if axis_name is None:
        return Outputs(moved, rest, [])
    shared = [weight, *(x[:2] for x in moved)]
    return Outputs(moved, rest, [jax.lax.all_gather(x, axis_name) for x in shared])


def _one_after_the_other(fn: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(jax.lax.map, fn)


def old_value_codes(leaves: int) -> np.ndarray:
    """Which coded old values move which leaves.

    Half of the coded values move any one leaf, or rather one of its two halves, and no
    two of these move in the same ones. So for each pair there is a value in which the
    first moves and the second stays at 0: whether anything follows is always seen.

    Returns:
      bool, shape (leaves, 2 halves, coded values).
    """
    rows = next(r for r in itertools.count(2) if math.comb(r, r // 2) >= 2 * leaves)
    chosen = itertools.combinations(range(rows), rows // 2)
    codes = np.zeros((2 * leaves, rows), bool)
    for code, moves in zip(codes, chosen, strict=False):
        code[list(moves)] = True
    return codes.reshape(leaves, 2, rows)


def second_half(shape: tuple[int, ...]) -> np.ndarray:
    """Which elements of a leaf belong to its second half: as on a chessboard."""
    return np.indices(shape, np.int32).sum(0) % 2 == 1


def _old_values(own: Any, size: Any, far: float, code: np.ndarray) -> jax.Array:
    """The old values of one leaf, along a new leading axis: see ``_share``."""
    zero = jnp.zeros_like(own)
    odd = sum(
        jax.lax.broadcasted_iota(jnp.int32, own.shape, d) for d in range(own.ndim)
    )
    first, second = code.reshape(2, -1, *[1] * own.ndim)
    moves = jnp.where(odd % 2 == 1, second, first)
    filled = jnp.full_like(own, far * (1 + 1j) if jnp.iscomplexobj(own) else far)
    # A product, since a choice would need sharding like that of ``size``.
    coded = moves.astype(size.dtype) * size[None]
    return jnp.concatenate([jnp.stack([zero, filled, own]), coded])


class Look(NamedTuple):
    """What tracing the model once, without computing, shows.

    Attributes:
      new: ``batch_stats`` as it returns them, in shapes and dtypes.
      handed_through: numbers of the leaves that are returned as they came.
    """

    new: PyTree
    handed_through: set[int]


def _remembered(find: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a finding with the program, for arguments of the same types."""

    @functools.wraps(find)
    def once(program: Program, static: Any, *arguments: PyTree) -> Any:
        leaves, treedef = jax.tree.flatten(arguments)
        types = tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
        key = find, static, treedef, types
        if key not in program.seen:
            program.seen[key] = find(program, static, *arguments)
        return program.seen[key]

    return once


@_remembered
def look_at(program: Program, axis: tuple[str, int] | None, *arguments: PyTree) -> Look:
    """Traces the model on ``params, batch_stats, batch``."""
    trace = jax.make_jaxpr(program.model, axis_env=axis and [axis], return_shape=True)
    closed, new = trace(*arguments)
    before, between = (len(jax.tree.leaves(x)) for x in arguments[:2])
    sources = enumerate(_source(closed.jaxpr, out) for out in closed.jaxpr.outvars)
    same = {place for place, source in sources if source == before + place}
    return Look(new, same & set(range(between)))


def _source(jaxpr: Any, var: Any) -> int | None:
    """The number of the input that comes out as ``var``, also out of calls."""
    for number, given in enumerate(jaxpr.invars):
        if given is var:
            return number
    for eqn in jaxpr.eqns:
        for place, out in enumerate(eqn.outvars):
            if out is not var:
                continue
            for inner in _jaxprs_in(eqn):
                same_call = (len(inner.invars), len(inner.outvars)) == (
                    len(eqn.invars),
                    len(eqn.outvars),
                )
                if same_call and eqn.primitive.name not in ("scan", "while"):
                    source = _source(inner, inner.outvars[place])
                    if source is not None:
                        return _source(jaxpr, eqn.invars[source])
            return None
    return None


@_remembered
def is_merged(
    program: Program,
    static: tuple[tuple[str, int] | None, Layout],
    *arguments: PyTree,
) -> bool:
    """Whether all old values together take one forward pass, within a tenth.

    Counted in elements computed; a model that cannot be batched at all is not merged.
    """
    axis, layout = static
    count = {}
    for full in (True, False):
        run = functools.partial(program.unmapped, layout._replace(full=full))
        trace = jax.make_jaxpr(run, axis_env=axis and [axis])
        try:
            count[full] = _elements(trace(*arguments).jaxpr)
        except (NotImplementedError, ValueError):  # as of callbacks
            return False
    moved = sum(math.prod(arguments[1][place].shape) for place in layout.moved)
    rows = 3 + old_value_codes(len(layout.moved)).shape[-1]
    free = count[False] / 10 + _FREE_OPERATIONS * rows * moved
    return count[True] - count[False] <= free


def _elements(jaxpr: Any) -> int:
    """How many array elements a computation produces."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(map(_elements, _jaxprs_in(eqn)))
        sizes = (getattr(out.aval, "size", 0) for out in eqn.outvars)
        total += max(inner * eqn.params.get("length", 1), sum(sizes))
    return total


def _jaxprs_in(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)  # of a closed one
            if hasattr(each, "eqns"):
                yield each
