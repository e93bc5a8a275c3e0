"""``lawa()``: the mean of the latest models."""

from typing import Any, NamedTuple

import jax
import optax
from jax.typing import DTypeLike

from swa_jax import _engine, _leafwise
from swa_jax._placement import as_array, follow, in_device_memory
from swa_jax._validate import check_count
from swa_jax.typing import Placement, PyTree


class LAWAState(NamedTuple):
    """State of ``lawa``: two counters and the latest models.

    Attributes:
      num_updates: int32 scalar, the optimizer updates seen so far.
      num_averaged: int32 scalar, the models ever sampled; the mean is of the latest
        ``min(num_averaged, window)``.
      window: pytree of the parameters' structure, each leaf with one more axis in
        front, of the size of the window; in the parameters' dtypes. The n-th model
        (from 1) is in row ``(n - 1) % window``. Rows that no model has reached are
        without meaning.
    """

    num_updates: jax.Array  # int32, shape ()
    num_averaged: jax.Array  # int32, shape ()
    window: PyTree  # leaves (window, *shape), in params' dtypes

    @property
    def avg_params(self) -> PyTree:
        """The mean, in float32 or wider; what is not averaged, as it was latest."""

        def mean(ring: Any) -> jax.Array:
            ring = in_device_memory(as_array(ring))
            return _leafwise.mean_of_rows(ring, follow(self.num_averaged, ring))

        return jax.tree.map(mean, self.window)


def lawa(
    window: int,
    start_step: int = 0,
    period: int = 1,
    *,
    stop_step: int | None = None,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the latest ``window`` models, all alike.

    The models themselves are kept, so memory is ``window`` times that of the weights;
    the mean is taken when it is read. A sampled step writes one of them in place. With
    weights of 16 bits or fewer on CPUs, every step writes all.

    Args:
      window: how many models, >= 1.
      start_step: see ``swa``, like ``period`` and ``stop_step``.
      period: see ``swa``; LAWA is usually given the ends of epochs.
      stop_step: see ``swa``.
      accumulator_dtype: floating dtype in which the models are kept; ``None`` for
        their own.
      sharding: where each model lives, see ``swa``.
      skip_nonfinite: see ``swa``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``LAWAState``; read it
      with ``averaged_params``.

    Raises:
      ValueError: ``window < 1``; see ``swa`` for the rest.
      TypeError: ``window`` is no integer; see also ``swa``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> average = swa_jax.lawa(2)
      >>> state = swa_jax.init_average(jnp.zeros(()), average)
      >>> for weight in (1.0, 2.0, 4.0):
      ...     state = swa_jax.update_average(state, jnp.float32(weight), average)
      >>> print(state.avg_params)
      3.0

    References:
      Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
      Latest Weight Averaging, 2022, https://arxiv.org/abs/2209.14981.
    """
    hint = "it is the number of models that are kept"
    return _engine.transformation(
        "lawa",
        LAWAState,
        _leafwise.Window(check_count("window", window, hint=hint)),
        (start_step, period, stop_step),
        accumulator_dtype=accumulator_dtype,
        sharding=sharding,
        skip_nonfinite=skip_nonfinite,
    )
