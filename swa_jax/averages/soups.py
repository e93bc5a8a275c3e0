"""Averages of models that exist: soups, and the merge that stands for a decay."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax._loop import averaged_with, init_average, update_average
from swa_jax._placement import as_array, beside
from swa_jax._validate import (
    check_count,
    check_params,
    is_averaged,
    leaf_dtypes,
    shown,
)
from swa_jax.typing import Indexed, PyTree, TreeT


def soup(models: Iterable[TreeT], weights: Iterable[float] | None = None) -> TreeT:
    """Averages models: the uniform soup, or a weighted one.

    ``sum(w * model) / sum(w)``, in float32 or wider. One model is in memory at a time,
    besides the average, if ``models`` makes them one by one.

    Args:
      models: iterable of pytrees alike in structure, shapes and kinds of dtypes.
      weights: a number for each model, also negative, as in task arithmetic; they are
        divided by their sum. ``None`` for all alike.

    Returns:
      A pytree like the first model, in its dtypes. Leaves that are not floating
      (integers, keys) are those of the last model.

    Raises:
      ValueError: there is no model, a model differs from the first, or ``weights`` are
        more or fewer than the models, not finite, or sum up to 0.
      TypeError: ``models`` is a single model, or a leaf is no array.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}]
      >>> print(swa_jax.soup(models)["w"], swa_jax.soup(models, [1, 3])["w"])
      [2. 4.] [2.5 5. ]
      >>> print(swa_jax.soup(models, [-1, 2])["w"])  # beyond the second
      [ 5. 10.]

    References:
      Wortsman et al., Model soups, ICML 2022, https://arxiv.org/abs/2203.05482.
      Negative weights: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023,
      https://arxiv.org/abs/2212.04089.
    """
    return _cast(*mean_of(models, weights))


def mean_of(
    models: Iterable[PyTree], weights: Iterable[float] | None
) -> tuple[PyTree, list[Any]]:
    """``soup`` in float32 or wider, and the dtypes that its leaves had."""
    _check_several("soup", models)
    shares = None if weights is None else _shares(weights)
    stream, first = _first("soup", models)
    dtypes = leaf_dtypes(first, caller="soup", name="models[0]")
    state = init_average(first)
    total, number = state.avg_params, 1
    if shares is None:
        state = update_average(state, first)
    else:
        total = _add(jax.tree.map(jnp.zeros_like, total), first, shares[0])
    like = jax.eval_shape(lambda x: x, total)
    del first  # else it would live on beside the others
    for model in stream:
        _check_alike("soup", number, model, like)
        if shares is None:
            state = update_average(state, model)
        elif number < len(shares):
            total = _add(total, model, shares[number])
        number += 1
        del model
    if shares is not None and number != len(shares):
        raise ValueError(_unequal(len(shares), number))
    return total if shares is not None else state.avg_params, dtypes


def greedy_soup(
    models: Indexed[TreeT],
    scores: Sequence[float],
    evaluate: Callable[[TreeT], float],
) -> TreeT:
    """Averages those models that do not make the average worse.

    Models are tried from the best score on; each stays if the mean with it scores at
    least as high as the mean without. Use a validation split: what is chosen by scores
    on the test set is no longer measured by them.

    Args:
      models: sequence of pytrees alike, see ``soup``; taken by index, one at a time, so
        it may load them, and a length and items are enough.
      scores: of each model by itself, higher is better. The best is that of the first
        soup, so they must come from ``evaluate``, or be comparable with it.
      evaluate: from weights to a score, higher is better; called once for each model
        but the best. For a loss, pass its negative.

    Returns:
      The mean of those that stayed, as ``soup`` returns it.

    Raises:
      ValueError: no model, other than one score a model, a score that is NaN, or models
        that differ.
      TypeError: see ``soup``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> models = [jnp.array(x) for x in (0.5, 3.0, -1.0)]
      >>> evaluate = lambda w: -abs(float(w))  # the best weight is 0
      >>> print(swa_jax.greedy_soup(models, [evaluate(m) for m in models], evaluate))
      -0.25

    References:
      Wortsman et al., Model soups, ICML 2022, https://arxiv.org/abs/2203.05482,
      recipe 1.
    """
    _check_several("greedy_soup", models)
    found = [float(score) for score in scores]
    if len(found) != len(models) or not found:
        raise ValueError(
            f"greedy_soup: got {len(models)} models and {len(found)} scores; pass one "
            "model at least, and a score for each"
        )
    if any(map(math.isnan, found)):
        raise ValueError(f"greedy_soup: scores must be numbers, got {found}")
    # The first of equals first, as sorted() keeps them.
    order = sorted(range(len(found)), key=lambda i: -found[i])
    first = models[order[0]]
    dtypes = leaf_dtypes(first, caller="greedy_soup", name=f"models[{order[0]}]")
    state = update_average(init_average(first), first)
    like, best = jax.eval_shape(lambda x: x, state.avg_params), found[order[0]]
    del first
    for i in order[1:]:
        model = models[i]
        _check_alike("greedy_soup", i, model, like)
        trial = averaged_with(state, model)
        score = float(evaluate(_cast(trial.avg_params, dtypes)))
        if score >= best:
            state, best = trial, score
        del model, trial
    return _cast(state.avg_params, dtypes)


def decay_weights(
    decay: Literal["linear", "cosine", "1-sqrt"] | Callable[[float], float], k: int
) -> np.ndarray:
    """Weights of a soup that stands for a decay of the learning rate.

    Take ``k`` models of a run at a constant rate, equally far apart. Their soup with
    these weights is where the steps between them would have led at the rates
    ``decay(1/k), ..., decay((k-1)/k)`` of the constant one, had the gradients been the
    same. With D(x) the decay, the i-th model counts for ``D((i-1)/k) - D(i/k)``, the
    last for ``D((k-1)/k)``; so a linear decay to 0 is the plain mean.

    Args:
      decay: ``"linear"`` (1 - x), ``"cosine"`` ((1 + cos(pi x)) / 2), ``"1-sqrt"``
        (1 - sqrt(x)), or a function from x in [0, 1] to a share of the rate that is 1
        at 0.
      k: how many models, >= 1.

    Returns:
      Weights, float64 of shape (k,), for the oldest model first; their sum is 1. Where
      a function of your own rises, they are negative.

    Raises:
      ValueError: an unknown name, ``k < 1``, or a function that is not finite or not 1
        at 0.
      TypeError: ``k`` is no integer.

    Example:
      >>> import swa_jax
      >>> print(swa_jax.decay_weights("linear", 4))
      [0.25 0.25 0.25 0.25]
      >>> print(swa_jax.decay_weights("1-sqrt", 4).round(3))
      [0.5   0.207 0.159 0.134]

    References:
      WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
      Pre-training, 2025, https://arxiv.org/abs/2507.17634, section 3.
    """
    check_count("k", k, hint="it is the number of models that are merged")
    if not callable(decay) and decay not in _DECAYS:
        raise ValueError(
            f"decay must be one of {', '.join(map(repr, _DECAYS))}, or a function from "
            f"[0, 1] to a share of the rate, got {shown(decay)}"
        )
    function = decay if callable(decay) else _DECAYS[decay]
    rates = np.array([float(function(i / k)) for i in range(k)])
    if not (np.isfinite(rates).all() and math.isclose(rates[0], 1, abs_tol=1e-6)):
        raise ValueError(
            f"decay must be finite, and 1 at 0, where the constant rate ends; got "
            f"{rates[0]:g} at 0 and {shown(rates.tolist())} in all"
        )
    return rates - np.append(rates[1:], 0.0)


_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def _check_several(caller: str, models: Any) -> None:
    if isinstance(models, Mapping | str | jax.Array | np.ndarray) or not (
        hasattr(models, "__iter__") or hasattr(models, "__getitem__")
    ):
        raise TypeError(
            f"{caller}: models must be several pytrees, got {shown(models)}, which is "
            "one, or none; pass a list, as in [params, other_params]"
        )


def _first(caller: str, models: Iterable[PyTree]) -> tuple[Iterator[PyTree], PyTree]:
    stream = iter(models)
    for first in stream:
        return stream, first
    raise ValueError(f"{caller}: models is empty; pass one model at least")


def _check_alike(caller: str, number: int, model: PyTree, like: PyTree) -> None:
    fix = "pass models of one architecture, saved alike"
    check_params(
        model,
        like,
        caller=caller,
        name=f"models[{number}]",
        other="the first model",
        fix=fix,
    )


def check_shares(weights: Iterable[float], number: int) -> list[float]:
    """Returns weights of so many models, or raises."""
    numbers = [float(weight) for weight in weights]
    _shares(numbers)
    if len(numbers) != number:
        raise ValueError(_unequal(len(numbers), number))
    return numbers


def _unequal(weights: int, models: int) -> str:
    return (
        f"soup: weights has {weights} numbers, but there are {models} models; pass one "
        "for each, or None for all alike"
    )


def _shares(weights: Iterable[float]) -> list[float]:
    numbers = np.array([float(weight) for weight in weights])
    total = numbers.sum() if numbers.size else math.nan
    # A sum that is 0 but for rounding would blow the models up.
    if not np.isfinite(total) or abs(total) <= 1e-9 * np.abs(numbers).sum():
        raise ValueError(
            "soup: weights must be finite numbers whose sum is not 0, by which they "
            f"are divided, got {shown(numbers.tolist())}"
        )
    return (numbers / total).tolist()


@functools.partial(jax.jit, donate_argnums=0)
def _add_leaves(total: PyTree, model: PyTree, share: jax.Array) -> PyTree:
    def add(x: jax.Array, new: jax.Array) -> jax.Array:
        if not is_averaged(x.dtype):
            return new
        return x + share.astype(jnp.finfo(x.dtype).dtype) * new.astype(x.dtype)

    return jax.tree.map(add, total, model)


def _add(total: PyTree, model: PyTree, share: float) -> PyTree:
    model = jax.tree.map(lambda x, new: beside(as_array(new), x), total, model)
    return _add_leaves(total, model, jnp.asarray(share, jnp.result_type(float)))


def _cast(weights: PyTree, dtypes: list[Any]) -> PyTree:
    leaves, treedef = jax.tree.flatten(weights)
    pairs = zip(leaves, dtypes, strict=True)
    cast = [x.astype(dtype) if x.dtype != dtype else x for x, dtype in pairs]
    return jax.tree.unflatten(treedef, cast)
