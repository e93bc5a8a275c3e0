"""``swag()``: a Gaussian around the mean of the weights."""

from typing import NamedTuple

import jax
import optax
from jax.typing import DTypeLike

from swa_jax import _engine, _leafwise
from swa_jax._validate import check_count
from swa_jax.typing import Placement, PyTree


class SWAGState(NamedTuple):
    """State of ``swag``: that of ``swa``, and how the models spread.

    Leaves that are not averaged (integers, keys) have ``optax.MaskedNode()`` in the
    last two fields, with ``rank=0`` all have it in the last. Complex leaves are two
    parameters each, real and imaginary part.

    Attributes:
      num_updates: int32 scalar, the optimizer updates seen so far.
      num_averaged: int32 scalar, the models sampled.
      avg_params: the mean, see ``SWAState``.
      sq_deviations: the sum of squared deviations from the mean, so
        ``num_averaged`` times the (biased) variance; like ``avg_params``.
      deviations: the latest models less the mean as each left it; leaves of
        ``avg_params`` with one more axis in front, of size ``rank``, the n-th model
        (from 1) in row ``(n - 1) % rank``.
    """

    num_updates: jax.Array  # int32, shape ()
    num_averaged: jax.Array  # int32, shape ()
    avg_params: PyTree  # like params; floating leaves in the accumulator's dtype
    sq_deviations: PyTree  # like avg_params
    deviations: PyTree  # leaves (rank, *shape), dtype of avg_params


def swag(
    rank: int = 20,
    start_step: int = 0,
    period: int = 1,
    *,
    stop_step: int | None = None,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights, and learns how they spread: SWA-Gaussian.

    Keeps the mean, the diagonal of the covariance, and the deviations of the latest
    ``rank`` models as its low-rank part. ``averaged_params`` reads the mean,
    ``swag_sample`` draws weights for Bayesian model averaging. Memory is ``rank + 2``
    times that of the weights in float32.

    The sum of squared deviations is Welford's, which never gets negative, whereas
    ``mean(q**2) - mean(q)**2`` loses all digits for weights far from 0.

    Args:
      rank: how many deviations, >= 0; the paper has 20, and 0 for SWAG-Diagonal.
      start_step: see ``swa``, like ``period`` and ``stop_step``.
      period: see ``swa``; the paper samples the ends of epochs.
      stop_step: see ``swa``.
      accumulator_dtype: dtype of everything that is kept, see ``swa``.
      sharding: see ``swa``; deviations live where the mean does.
      skip_nonfinite: see ``swa``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``SWAGState``.

    Raises:
      ValueError: ``rank < 0``; see ``swa`` for the rest.
      TypeError: ``rank`` is no integer; see also ``swa``.

    Example:
      >>> import jax, jax.numpy as jnp, swa_jax
      >>> average = swa_jax.swag(rank=5)
      >>> state = swa_jax.init_average(jnp.zeros(2), average)
      >>> for t in range(8):
      ...     params = jnp.array([t, -t], jnp.float32)
      ...     state = swa_jax.update_average(state, params, average)
      >>> print(state.avg_params, state.sq_deviations / state.num_averaged)
      [ 3.5 -3.5] [5.25 5.25]
      >>> sample = swa_jax.swag_sample(jax.random.key(0), state, params)
      >>> print(sample.shape)
      (2,)

    References:
      Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning,
      NeurIPS 2019, https://arxiv.org/abs/1902.02476, section 3.
    """
    hint = "it is the number of deviations that are kept"
    return _engine.transformation(
        "swag",
        SWAGState,
        _leafwise.Gaussian(check_count("rank", rank, at_least=0, hint=hint)),
        (start_step, period, stop_step),
        accumulator_dtype=accumulator_dtype,
        sharding=sharding,
        skip_nonfinite=skip_nonfinite,
    )
