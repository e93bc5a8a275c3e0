"""Batch statistics of Flax's models, of linen and of nnx."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

import swa_jax
from swa_jax.frameworks._inputs import arguments_of, check_inputs
from swa_jax.frameworks._kept import kept, weak
from swa_jax.typing import BatchStatsFn, BatchWeight, Inputs, Keep, Mode, PyTree


def batch_stats_fn(
    module: nn.Module,
    *,
    inputs: Inputs = None,
    rngs: PyTree | Callable[[PyTree], PyTree] | None = None,
    variables: Mapping[str, PyTree] | None = None,
    **call: Any,
) -> BatchStatsFn:
    """The forward pass of a linen module, for ``swa_jax.recompute_batch_stats``.

    Args:
      module: the module, unbound.
      inputs: what it is called with: a key or index of the batch, or a function from
        the batch to the input (a tuple is several arguments); by default the batch.
      rngs: keys for layers that draw, such as ``{"dropout": jax.random.key(0)}``, which
        then draw alike in every batch; or a function from the batch to such a dict, for
        batches that bring a key of their own.
      variables: other collections that the module reads, by name.
      **call: more arguments of ``module.apply``: what makes the module run in training
        mode, such as ``train=True`` or ``use_running_average=False``; ``method=``.

    Returns:
      A function ``(params, batch_stats, batch) -> batch_stats``. Make it once and use
      it again: what is compiled for it lives as long as it does.

    Raises:
      TypeError: ``module`` is no linen module, or ``inputs`` is none of the above.
      ValueError: ``mutable`` among ``call``; a batch without the part that ``inputs``
        names (when called).

    Note:
      The vectors of ``nn.SpectralNorm`` are in ``batch_stats`` too, and are no average:
      leave them as they are with ``keep=swa_jax.frameworks.flax.is_spectral_norm``.
      Evaluation iterates from them on the weights it has, as training does.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, swa_jax
      >>> from swa_jax.frameworks.flax import batch_stats_fn
      >>> norm = nn.BatchNorm()
      >>> batches = [jnp.arange(4.0)[:, None], jnp.array([[10.0], [14.0]])]
      >>> fn = batch_stats_fn(norm, use_running_average=False)
      >>> made = norm.init(jax.random.key(0), batches[0], use_running_average=False)
      >>> stats = swa_jax.recompute_batch_stats(
      ...     fn, made["params"], made["batch_stats"], batches)
      >>> print(f"{stats['mean'][0]:.2f} {stats['var'][0]:.2f}")
      5.00 26.67
    """
    if not isinstance(module, nn.Module):
        fix = (
            "for an nnx model use swa_jax.frameworks.flax.recompute_batch_stats"
            if isinstance(module, nnx.Module)
            else "pass the module itself, not its class, apply or variables"
        )
        raise TypeError(
            f"module must be a flax.linen.Module, got {type(module).__name__}; {fix}"
        )
    if "mutable" in call:
        raise ValueError(
            f"mutable={call['mutable']!r} must not be given: the function sets it to "
            "['batch_stats']; pass collections that are only read with variables="
        )
    check_inputs(inputs)

    def forward(params: PyTree, batch_stats: PyTree, batch: PyTree) -> PyTree:
        given = {**(variables or {}), "params": params, "batch_stats": batch_stats}
        keys = rngs(batch) if callable(rngs) else rngs
        arguments = arguments_of(batch, inputs)
        _, updated = module.apply(
            given, *arguments, rngs=keys, mutable=["batch_stats"], **call
        )
        return updated["batch_stats"]

    return forward


def is_spectral_norm(name: str) -> bool:
    """Whether a leaf of ``batch_stats`` has the name of linen's ``SpectralNorm``'s.

    For ``keep=`` of ``swa_jax.recompute_batch_stats``.

    Args:
      name: of the leaf, as in ``"SpectralNorm_0/Dense_0/kernel/u"``.

    Example:
      >>> is_spectral_norm("SpectralNorm_0/Dense_0/kernel/sigma")
      True
    """
    return len(name.split("/")) > 2 and name.endswith(("/u", "/sigma"))


def recompute_batch_stats(
    model: nnx.Module,
    batches: Iterable[PyTree],
    *,
    inputs: Inputs = None,
    forward: Callable[[Any, PyTree], object] | None = None,
    mode: Mode = "pooled",
    keep: Keep = None,
    pairs: Mapping[str, str] | None = None,
    batch_weight: BatchWeight | None = None,
) -> None:
    """Sets the batch statistics of an nnx model to those of its weights, in place.

    The pass runs a copy of the model in training mode, ``model.train()``, so Dropout
    drops, each batch with keys of its own. In ``model`` only the ``nnx.BatchStat``
    variables change: its parameters, its modes and its random keys stay, and after an
    error all does. The vectors of ``nnx.SpectralNorm`` are no averages and stay as
    well: evaluation iterates from them on the weights it has, as training does.

    Args:
      model: with the weights that it is to be evaluated with, in training or evaluation
        mode.
      batches: see ``swa_jax.recompute_batch_stats``, like all that follows ``forward``.
      inputs: what the model is called with: a key or index of the batch, or a function
        from the batch to the input (a tuple is several arguments); by default the
        batch.
      forward: in place of ``inputs``, ``(model, batch)``: runs the model, which is in
        training mode, as a training step does. Its result is not used.
      mode: how batches are combined.
      keep: statistics that stay as they are, by name, such as ``"norm/mean"``; that of
        a layer which is frozen in training, for one.
      pairs: names of variances with those of their means.
      batch_weight: how much a batch counts.

    Raises:
      TypeError: ``model`` is no nnx module; ``inputs`` or ``forward`` is none of the
        above.
      ValueError: both of ``inputs`` and ``forward``; a model without ``nnx.BatchStat``;
        see ``swa_jax.recompute_batch_stats`` for the rest.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.arange(4.0)[:, None], jnp.array([[10.0], [14.0]])]
      >>> recompute_batch_stats(norm, batches)
      >>> print(f"{norm.mean[0]:.2f} {norm.var[0]:.2f}")
      5.00 26.67
    """
    if not isinstance(model, nnx.Module):
        fix = (
            "for linen there is swa_jax.frameworks.flax.batch_stats_fn"
            if isinstance(model, nn.Module)
            else "pass the model itself"
        )
        raise TypeError(
            f"model must be an instance of nnx.Module, got {type(model).__name__}; "
            f"{fix}"
        )
    check_inputs(inputs)
    if forward is not None and not callable(forward):
        raise TypeError(
            "forward must be a function (model, batch), got "
            f"{type(forward).__name__}; leave it out to call the model itself"
        )
    if forward is not None and inputs is not None:
        raise ValueError(
            f"inputs={inputs!r:.60} has no meaning with forward, which gets the whole "
            "batch; leave one of them out"
        )

    is_statistic = nnx.All(nnx.BatchStat, _not_under(_spectral_norms(model)))
    # The counts go on from batch to batch, so that each draws otherwise.
    parts: Any = nnx.split(model, nnx.Any(is_statistic, nnx.RngCount), ...)
    graphdef, stats, rest = parts
    if not nnx.to_flat_state(nnx.filter_state(stats, nnx.BatchStat)):
        raise ValueError(
            f"model, a {type(model).__name__}, has no nnx.BatchStat to recompute; it "
            "needs no pass (hold running statistics of layers of your own in "
            "nnx.BatchStat)"
        )

    key = graphdef, weak(inputs), weak(forward)

    def make() -> BatchStatsFn:
        return functools.partial(_run, *key, is_statistic)

    recomputed = swa_jax.recompute_batch_stats(
        kept(model, key, make),
        rest,
        stats,
        batches,
        mode=mode,
        keep=keep,
        pairs=pairs,
        batch_weight=batch_weight,
    )
    nnx.update(model, nnx.filter_state(recomputed, nnx.BatchStat))


def _run(
    graphdef: Any,
    inputs: Callable[[], Inputs],
    forward: Callable[[], Callable[[Any, PyTree], object] | None],
    is_statistic: Any,
    rest: PyTree,
    stats: PyTree,
    batch: PyTree,
) -> PyTree:
    copy = nnx.merge(graphdef, stats, rest, copy=True)
    copy.train()
    run = forward()
    if run is None:
        copy(*arguments_of(batch, inputs()))
    else:
        run(copy, batch)
    return nnx.state(copy, nnx.Any(is_statistic, nnx.RngCount))


def _spectral_norms(model: nnx.Module) -> list[tuple[Any, ...]]:
    """Where the vectors of spectral norms are, if this Flax has any."""
    kind = getattr(nnx, "SpectralNorm", None)
    if kind is None:
        return []
    nodes: Any = nnx.iter_graph(model)
    return [(*path, "batch_stats") for path, node in nodes if isinstance(node, kind)]


def _not_under(parents: list[tuple[Any, ...]]) -> Callable[[Any, Any], bool]:
    def fits(path: Any, value: Any) -> bool:
        return not any(tuple(path[: len(parent)]) == parent for parent in parents)

    return fits
