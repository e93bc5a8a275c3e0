"""Batch statistics of Equinox's models."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.nn import BatchNorm, SpectralNorm, State, StateIndex

import swa_jax
from swa_jax.frameworks._kept import kept, weak
from swa_jax.typing import BatchStatsFn, BatchWeight, Keep, Mode, PyTree

_Node = TypeVar("_Node")
#: A counter that no training after it takes beyond int32.
_LARGEST_COUNTER = 2**30
#: Power iterations, from vectors that training left close to the ones wanted.
_POWER_ITERATIONS = 100


def recompute_batch_stats(
    model: PyTree,
    state: State,
    batches: Iterable[PyTree],
    forward: Callable[[Any, State, PyTree], tuple[Any, State]],
    *,
    mode: Mode = "pooled",
    keep: Keep = None,
    pairs: Mapping[str, str] | None = None,
    batch_weight: BatchWeight | None = None,
) -> State:
    """Computes the state of a model whose weights are an average.

    ``BatchNorm`` of either mode gets the statistics of ``batches``: inference reads
    them exactly, and training goes on from them as from a long average, mode "batch"
    (which divides by ``1 - momentum**counter``) with its counter far along, mode "ema"
    with its first time over. In the pass every ``BatchNorm`` normalises by the batch,
    also of mode "ema", which in training normalises by its own average. The vectors of
    ``SpectralNorm`` are first brought to the weights of ``model`` by power iterations
    and then stay, as in inference. Whatever else is in ``state`` is treated as by
    ``swa_jax.recompute_batch_stats``.

    Args:
      model: with the weights that it is to be evaluated with, in training or inference
        mode. Other layers, such as Dropout, run in training mode.
      state: of that model, as training left it. It stays valid.
      batches: see ``swa_jax.recompute_batch_stats``, like all that follows ``forward``.
      forward: ``(model, state, batch) -> (output, state)``, as a training step runs the
        model. The output is not used. Mostly::

            def forward(model, state, batch):
                run = jax.vmap(model, in_axes=(0, None), out_axes=(0, None),
                               axis_name="batch")
                return run(batch["image"], state)

      mode: how batches are combined.
      keep: what stays as it is, by name: the path of its layer in the model, such as
        ``".layers[1]"``, or of one statistic, ``".layers[1]/mean"``.
      pairs: names of variances with those of their means.
      batch_weight: how much a batch counts.

    Returns:
      A new ``State``.

    Raises:
      TypeError: ``state`` is no ``State``, or ``forward`` is no function.
      ValueError: a model without any state; ``forward`` returns no state; see
        ``swa_jax.recompute_batch_stats`` for the rest.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "b", mode="batch")
      >>> batches = [jnp.arange(4.0)[:, None], jnp.array([[10.0], [14.0]])]
      >>> def forward(norm, state, x):
      ...     return jax.vmap(norm, (0, None), (0, None), axis_name="b")(x, state)
      >>> state = recompute_batch_stats(norm, state, batches, forward)
      >>> x, _ = eqx.nn.inference_mode(norm)(jnp.array([10.0]), state)
      >>> print(f"{(x[0]):.4f}")  # (10 - 5.00) / sqrt(26.67)
      0.9682
    """
    if not isinstance(state, State):
        raise TypeError(
            f"state must be an equinox.nn.State, got {type(state).__name__}; pass the "
            "second of what equinox.nn.make_with_state returned, as training left it"
        )
    if not callable(forward):
        raise TypeError(
            "forward must be a function (model, state, batch) -> (output, state), got "
            f"{type(forward).__name__}"
        )
    model = eqx.nn.inference_mode(model, value=False)
    parts = _Parts(model)
    if not parts.norms and not parts.others:
        raise ValueError(
            f"model, of type {type(model).__name__}, has no BatchNorm or other state "
            "to recompute; it needs no pass. Pass the model and state that "
            "equinox.nn.make_with_state made"
        )

    settled = _clone(state)
    for layer in _nodes(model, SpectralNorm):
        settled = settled.set(layer.uv_index, _singular_vectors(layer, settled))
    # In training these would iterate on, away from what inference uses.
    arrays, static = eqx.partition(_in_inference(model), eqx.is_array)
    key = jax.tree.structure(static), jax.tree.leaves(static)

    def make() -> BatchStatsFn:
        return functools.partial(_run, weak(forward), static)

    recomputed = swa_jax.recompute_batch_stats(
        kept(forward, key, make),
        (arrays, settled),
        parts.read(settled, debiased=True),
        batches,
        mode=mode,
        keep=keep,
        pairs=pairs,
        batch_weight=batch_weight,
    )
    return parts.write(settled, recomputed, done=True)


def _run(
    forward: Callable[[], Callable[[Any, State, PyTree], Any]],
    static: PyTree,
    params: PyTree,
    stats: PyTree,
    batch: PyTree,
) -> PyTree:
    arrays, state = params
    model = eqx.combine(arrays, static)
    parts = _Parts(model)
    result = forward()(model, parts.write(state, stats, done=False), batch)
    if not (isinstance(result, tuple) and isinstance(result[-1], State)):
        raise ValueError(
            "forward must return (output, state), with the state that the model "
            f"returned, got {type(result).__name__}"
        )
    return parts.read(result[-1])


class _Parts:
    """What of a model's state are statistics, and what they are called.

    Attributes:
      norms: the layers with statistics, by the marker of these.
      others: the places of whatever else is in the state, likewise.
      names: what messages and ``keep=`` call all of them.
    """

    def __init__(self, model: PyTree) -> None:
        self.norms = {_indices(x)[0].marker: x for x in _nodes(model, BatchNorm)}
        known = _markers(self.norms)
        known |= {x.uv_index.marker for x in _nodes(model, SpectralNorm)}
        self.others = {
            index.marker: index
            for index in _nodes(model, StateIndex)
            if index.marker not in known
        }
        self.names = _names(model, self.norms)

    def read(self, state: State, *, debiased: bool = False) -> PyTree:
        """What the pass computes, by name."""
        found: dict[str, Any] = {}
        for marker, norm in self.norms.items():
            mean, var = state.get(_indices(norm)[0])
            if debiased and norm.mode == "batch":
                scale = _debiasing(norm, state)
                mean, var = mean / scale, var / scale
            found[self.names[marker]] = {"mean": mean, "var": var}
        for marker, index in self.others.items():
            found[self.names[marker]] = state.get(index)
        return found

    def write(self, state: State, stats: PyTree, done: bool) -> State:
        """A state with these, to run the pass from, or to be read."""
        state = _clone(state)
        for marker, norm in self.norms.items():
            values = stats[self.names[marker]]
            state = _set_norm(norm, state, values["mean"], values["var"], done)
        for marker, index in self.others.items():
            state = state.set(index, stats[self.names[marker]])
        return state


def _nodes(tree: PyTree, kind: type[_Node]) -> list[_Node]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]


def _indices(norm: BatchNorm) -> tuple[Any, Any]:
    """Of its statistics, and of its first time (mode "ema") or counter."""
    if norm.mode == "ema":
        return norm.ema_state_index, norm.ema_first_time_index
    return norm.batch_state_index, norm.batch_counter


def _markers(norms: Mapping[Any, BatchNorm]) -> set[Any]:
    """Of all that these layers keep in the state."""
    indices = (index for norm in norms.values() for index in _nodes(norm, StateIndex))
    return {index.marker for index in indices}


def _names(model: PyTree, norms: Mapping[Any, BatchNorm]) -> dict[Any, str]:
    """What messages and ``keep=`` call a state: its path, or its layer's."""
    is_index = lambda x: isinstance(x, StateIndex)  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_index)[0]
    names: dict[Any, str] = {}
    for path, leaf in flat:
        if is_index(leaf):
            own = path[:-1] if leaf.marker in norms else path
            names.setdefault(leaf.marker, jax.tree_util.keystr(own) or "model")
    return names


def _clone(state: State) -> State:
    """The same values, in a ``State`` that may be set without spoiling this one."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, leaves)


def _set_norm(
    norm: BatchNorm, state: State, mean: jax.Array, var: jax.Array, done: bool
) -> State:
    """Puts statistics into the state, to run the pass from, or to be read."""
    statistics, flag_or_counter = _indices(norm)
    counter = state.get(flag_or_counter)
    if norm.mode == "ema":
        # The first time it normalises by the batch, and stores that as it is.
        state = state.set(flag_or_counter, jnp.full_like(counter, not done))
    elif done:
        least, scale = _counter_without_bias(norm.momentum, float(jnp.finfo(var).eps))
        state = state.set(flag_or_counter, jnp.maximum(counter, least))
        mean, var = mean * scale, var * scale
    return state.set(statistics, (mean, var))


def _debiasing(norm: BatchNorm, state: State) -> jax.Array:
    """What inference divides by in mode "batch", for each statistic."""
    counter = state.get(_indices(norm)[1])
    scale = jnp.where(counter == 0, 1, 1 - norm.momentum**counter)
    return scale[..., None]  # of a stack of layers, too


def _counter_without_bias(momentum: float, eps: float) -> tuple[int, float]:
    """A counter, and ``1 - momentum**counter``: 1 in floats of spacing ``eps``."""
    needed = math.log(eps / 8) / math.log(momentum) if 0 < momentum < 1 else 1
    if needed <= _LARGEST_COUNTER:
        return math.ceil(needed), 1.0
    return _LARGEST_COUNTER, -math.expm1(_LARGEST_COUNTER * math.log(momentum))


def _singular_vectors(layer: SpectralNorm, state: State) -> tuple[jax.Array, jax.Array]:
    """Of the largest singular value of the layer's weight, also of a stack of them."""
    u, v = state.get(layer.uv_index)
    weight = getattr(layer.layer, layer.weight_name).reshape(*u.shape, -1)

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.maximum(layer.eps, jnp.linalg.norm(x, axis=-1, keepdims=True))

    def iterate(_: int, uv: tuple[jax.Array, jax.Array]) -> Any:
        u = unit(jnp.einsum("...ij,...j->...i", weight, uv[1]))
        return u, unit(jnp.einsum("...ij,...i->...j", weight, u))

    return jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, (u, v))


def _in_inference(model: PyTree) -> PyTree:
    """The model with its spectral norms, and not what is in them, in inference mode."""

    def set_mode(x: Any) -> Any:
        if not isinstance(x, SpectralNorm):
            return x
        return eqx.tree_at(lambda layer: layer.inference, x, replace=True)

    is_leaf = lambda x: isinstance(x, SpectralNorm)  # noqa: E731
    return jax.tree.map(set_mode, model, is_leaf=is_leaf)
