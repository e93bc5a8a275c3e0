"""``ema()`` and ``power_ema()``: the latest models count for most."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from swa_jax import _engine, _leafwise, _rules
from swa_jax._validate import check_number
from swa_jax.typing import Decay, Placement, PyTree


class EMAState(NamedTuple):
    """State of ``ema``; the fields are those of ``SWAState``.

    Attributes:
      num_updates: int32 scalar, the optimizer updates seen so far.
      num_averaged: int32 scalar, the models in the average.
      avg_params: the average, see ``SWAState``; bias-corrected as it stands.
    """

    num_updates: jax.Array  # int32, shape ()
    num_averaged: jax.Array  # int32, shape ()
    avg_params: PyTree  # like params; floating leaves in the accumulator's dtype


class PowerEMAState(NamedTuple):
    """State of ``power_ema``; the fields are those of ``SWAState``.

    Attributes:
      num_updates: int32 scalar, the optimizer updates seen so far.
      num_averaged: int32 scalar, the models in the average.
      avg_params: the average, see ``SWAState``.
    """

    num_updates: jax.Array  # int32, shape ()
    num_averaged: jax.Array  # int32, shape ()
    avg_params: PyTree  # like params; floating leaves in the accumulator's dtype


def ema(
    decay: Decay = 0.999,
    start_step: int = 0,
    period: int = 1,
    *,
    debias: bool = True,
    stop_step: int | None = None,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights exponentially: the latest models count for most.

    The n-th model ``q`` that is sampled enters by ::

        mean += rate(n) * (q - mean),    rate(n) = (1 - decay) / (1 - decay**n)

    so that a model counts ``decay`` times as much as the next. That is Adam's bias
    correction of an average that starts from zeros: the first model has all the weight
    there is. With ``debias=False`` the rate is ``1 - decay`` and the first model is
    copied, as in most implementations: it then keeps ``decay**(n - 1)`` of the weight,
    37 % after 1,000 models with 0.999. The initial weights are no model.

    The mean is kept in float32 for narrower weights: in bfloat16 a decay of 0.999
    would leave it at its first value for ever. ``1 - decay`` is taken in float64.

    Args:
      decay: in [0, 1), or a function from ``n`` (an int32 scalar) to one, such as
        ``ema_warmup`` makes; the rate is then ``1 - decay(n)``, limited to [0, 1],
        whatever ``debias``. A function is evaluated in JAX's own precision
        (``1 - 1/n`` of an int32 in float32), and ``optax.inject_hyperparams`` rounds a
        number to float32.
      start_step: see ``swa``, like ``period`` and ``stop_step``.
      period: see ``swa``; ``decay`` is per sampled model, not per update.
      debias: whether to correct the bias towards the first model.
      stop_step: see ``swa``.
      accumulator_dtype: see ``swa``.
      sharding: see ``swa``.
      skip_nonfinite: see ``swa``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``EMAState``; read it with
      ``averaged_params``.

    Raises:
      ValueError: a number ``decay`` outside [0, 1); see ``swa`` for the rest.
      TypeError: ``decay`` is neither a number nor a function; see also ``swa``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> average = swa_jax.ema(0.5)
      >>> state = swa_jax.init_average(jnp.zeros(()), average)
      >>> for weight in (1.0, 2.0, 4.0):
      ...     state = swa_jax.update_average(state, jnp.float32(weight), average)
      >>> print(state.avg_params)  # (4 * 4 + 2 * 2 + 1) / 7
      3.0

    References:
      Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992. The correction: Kingma
      and Ba, Adam, ICLR 2015, https://arxiv.org/abs/1412.6980, section 3.
    """
    if callable(decay):
        rule: _rules.Rule = _rules.Varying(decay)
    else:
        hint = "ema() keeps the latest models, the plain mean of all is swa()"
        rule = _rules.Exponential(
            check_number("decay", decay, 0, 1, hint=hint, traced=True), bool(debias)
        )
    return _engine.transformation(
        "ema",
        EMAState,
        _leafwise.Mean(rule),
        (start_step, period, stop_step),
        accumulator_dtype=accumulator_dtype,
        sharding=sharding,
        skip_nonfinite=skip_nonfinite,
    )


def ema_warmup(
    decay: float,
    *,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_decay: float = 0.0,
) -> Decay:
    """A decay for ``ema`` that grows with the models averaged.

    ::

        decay(n) = clip(1 - (1 + (n - 1) / inv_gamma)**-power, min_decay, decay)

    It starts from 0, so the first models are soon forgotten. ``power=2/3`` reaches
    0.999 after some 32,000 models, ``power=3/4`` after 10,000.

    Args:
      decay: the largest, in [0, 1].
      inv_gamma: models that the growth is measured in, > 0.
      power: how fast it grows, > 0.
      min_decay: the smallest, 0 <= ``min_decay`` <= ``decay``.

    Returns:
      A function from the number of the model, an integer array, to the decay. Equal
      ones compare equal.

    Raises:
      ValueError: a number out of its range.
      TypeError: what is no number.

    Example:
      >>> import swa_jax
      >>> decay = swa_jax.ema_warmup(0.999)
      >>> [round(float(decay(n)), 3) for n in (1, 8, 1000, 10**6)]
      [0.0, 0.75, 0.99, 0.999]
      >>> average = swa_jax.ema(decay)

    References:
      timm's ``ModelEmaV3``, ema-pytorch and diffusers' ``EMAModel``.
    """
    decay = check_number("decay", decay, 0, 1, closed=True)
    return _rules.Warmup(
        decay,
        check_number("inv_gamma", inv_gamma, 0, math.inf, open_below=True),
        check_number("power", power, 0, math.inf, open_below=True),
        check_number("min_decay", min_decay, 0, decay, closed=True),
    )


def power_ema(
    sigma_rel: float = 0.05,
    start_step: int = 0,
    period: int = 1,
    *,
    gamma: ArrayLike | None = None,
    stop_step: int | None = None,
    accumulator_dtype: DTypeLike | None = None,
    sharding: Placement = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights over a fixed share of all models so far.

    The n-th model that is sampled enters at the rate ``1 - (1 - 1/n)**(gamma + 1)``.
    Of many models, the one at a fraction t of them counts in proportion to
    ``t**gamma``, so the average forgets its beginnings at any length of training.

    Keep two of different widths, store both from time to time, and ``posthoc_ema``
    gives every other width after training.

    Args:
      sigma_rel: the profile's standard deviation as a share of training, in
        (0, 0.288]: 0.05 means that most of the weight is on the last tenth.
      start_step: see ``swa``, like ``period`` and ``stop_step``.
      period: see ``swa``.
      gamma: the exponent itself, > -1, in place of ``sigma_rel``; 0 is ``swa``.
      stop_step: see ``swa``.
      accumulator_dtype: see ``swa``.
      sharding: see ``swa``.
      skip_nonfinite: see ``swa``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``PowerEMAState``; read it
      with ``averaged_params``.

    Raises:
      ValueError: ``sigma_rel`` or ``gamma`` out of its range; see ``swa`` for the rest.
      TypeError: what is no number; see also ``swa``.

    Example:
      >>> import jax.numpy as jnp, swa_jax
      >>> average = swa_jax.power_ema(gamma=1)  # the n-th model counts for n
      >>> state = swa_jax.init_average(jnp.zeros(()), average)
      >>> for weight in (0.0, 3.0, 6.0):
      ...     state = swa_jax.update_average(state, jnp.float32(weight), average)
      >>> print(round(float(state.avg_params), 4))  # rates 1, 3/4, 5/9
      4.3333

    References:
      Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models,
      CVPR 2024, https://arxiv.org/abs/2312.02696, section 3.
    """
    if gamma is None:
        gamma = _rules.gamma_of(check_sigma("sigma_rel", sigma_rel))
    else:
        gamma = check_number("gamma", gamma, -1, math.inf, open_below=True, traced=True)
    return _engine.transformation(
        "power_ema",
        PowerEMAState,
        _leafwise.Mean(_rules.Power(gamma)),
        (start_step, period, stop_step),
        accumulator_dtype=accumulator_dtype,
        sharding=sharding,
        skip_nonfinite=skip_nonfinite,
    )


def check_sigma(name: str, sigma_rel: Any) -> float:
    """Returns the relative deviation of some power average, or raises."""
    widest = float(np.sqrt(1 / 12))  # the equal mean's, gamma = 0
    hint = (
        f"at {widest:.4f} it is swa(), the mean of all; optax.inject_hyperparams needs "
        "static_args=('sigma_rel',), or gamma="
    )
    return check_number(
        name, sigma_rel, 0, widest, hint=hint, open_below=True, closed=True
    )
