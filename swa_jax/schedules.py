"""Learning-rate schedules that weight averaging is used with.

Each is an ``optax.Schedule``: a pure function from the 0-based step (a Python number,
or an array of any integer dtype, traced or not) to the learning rate, a float scalar.
All are exact at their boundaries: where a schedule promises ``swa_lr``, it returns that
very float.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

Strategy = Literal["cos", "linear"]


def cosine_to_constant_schedule(
    init_value: float, swa_lr: float, decay_steps: int, *, warmup_steps: int = 0
) -> optax.Schedule:
    """Cosine decay from ``init_value`` to ``swa_lr``, joined to that constant.

    With ``W = warmup_steps`` and ``D = decay_steps``::

        lr(t) = init_value * t / W                                     t < W
        lr(t) = init_value * (1 - a) + swa_lr * a                      W <= t < D
                with a = (1 - cos(pi * (t - W) / (D - W))) / 2
        lr(t) = swa_lr                                                 t >= D

    As in ``optax.warmup_cosine_decay_schedule``, ``decay_steps`` includes the warm-up,
    so the constant begins at step ``decay_steps``, and averaging can start there.

    Args:
      init_value: learning rate at the top of the cosine.
      swa_lr: constant learning rate of the averaging phase.
      decay_steps: step from which on the rate is constant, >= 0; 0 for a constant.
      warmup_steps: steps of linear warm-up from 0, 0 <= ``warmup_steps`` <=
        ``decay_steps``.

    Returns:
      A schedule from the step to a float32 scalar.

    Raises:
      ValueError: a negative length or rate, a rate that is not finite, or a warm-up
        longer than ``decay_steps``.
      TypeError: a length that is no integer, a rate that is no number.

    Example:
      >>> schedule = cosine_to_constant_schedule(0.1, 0.02, decay_steps=100)
      >>> [round(float(schedule(step)), 4) for step in (0, 50, 100, 1000)]
      [0.1, 0.06, 0.02, 0.02]

    References:
      Loshchilov and Hutter, SGDR, ICLR 2017, https://arxiv.org/abs/1608.03983 (the
      cosine); Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, section
      3.2 (the constant rate).
    """
    check_rate("init_value", init_value)
    check_rate("swa_lr", swa_lr)
    decay_steps = _check_length("decay_steps", decay_steps)
    warmup_steps = _check_length("warmup_steps", warmup_steps)
    if warmup_steps > decay_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is more than decay_steps={decay_steps}; "
            "decay_steps counts from step 0 and includes the warm-up"
        )

    def schedule(step: Any) -> jax.Array:
        step = as_step(step)
        lr = _blend(
            init_value,
            swa_lr,
            _alpha("cos", step - warmup_steps, decay_steps - warmup_steps),
        )
        if warmup_steps:
            rising = init_value * (step / warmup_steps)
            lr = jnp.where(step < warmup_steps, rising, lr)
        return lr

    return schedule


def swa_schedule(
    base: optax.ScalarOrSchedule,
    swa_lr: float | None,
    start_step: int,
    anneal_steps: int,
    *,
    strategy: Strategy = "cos",
    update_every: int = 1,
) -> optax.Schedule:
    """Follows ``base``, then anneals to ``swa_lr`` and stays there.

    With ``lr0 = base(start_step)`` and ``u = t - start_step``::

        lr(t) = base(t)                                                t < start_step
        lr(t) = lr0 * (1 - a(x)) + swa_lr * a(x)                       t >= start_step
                with x = min(1, update_every * (u // update_every) / anneal_steps)

    where ``a(x)`` is ``x`` (linear) or ``(1 - cos(pi * x)) / 2`` (cos). For
    ``update_every = S`` and ``anneal_steps = S * anneal_epochs`` this is the closed
    form of ``torch.optim.swa_utils.SWALR`` stepped at each end of an epoch of ``S``
    steps. One difference is deliberate: ``anneal_steps=0`` jumps to ``swa_lr`` at
    ``start_step``; PyTorch's rescales the schedule before it, and jumps an epoch later.

    Args:
      base: learning rate, or schedule, of the phase before.
      swa_lr: learning rate of the averaging phase; ``None`` holds ``lr0``.
      start_step: first step of the anneal, >= 0.
      anneal_steps: steps that the anneal takes, >= 0; 0 jumps at once.
      strategy: ``"cos"`` or ``"linear"``.
      update_every: hold the rate for so many steps at a time, >= 1.

    Returns:
      A schedule from the step to a float scalar.

    Raises:
      ValueError: a negative length or rate, a rate that is not finite,
        ``update_every < 1``, or an unknown strategy.
      TypeError: a length that is no integer, a rate that is no number, or a ``base``
        that is neither a number nor a schedule.

    Example:
      >>> schedule = swa_schedule(0.1, 0.05, start_step=10, anneal_steps=10)
      >>> [round(float(schedule(step)), 4) for step in (9, 10, 15, 20, 30)]
      [0.1, 0.1, 0.075, 0.05, 0.05]

    References:
      ``torch.optim.swa_utils.SWALR``, PyTorch 2.13.
    """
    if swa_lr is not None:
        check_rate("swa_lr", swa_lr, " or None to hold the rate")
    start_step = _check_length("start_step", start_step)
    anneal_steps = _check_length("anneal_steps", anneal_steps)
    update_every = _check_length("update_every", update_every, at_least=1)
    check_strategy("strategy", strategy)
    base = as_schedule(base)

    def schedule(step: Any) -> jax.Array:
        step = as_step(step)
        lr0 = base(jnp.asarray(start_step, step.dtype))
        since = step - start_step
        alpha = _alpha(strategy, since - since % update_every, anneal_steps)
        annealed = _blend(lr0, lr0 if swa_lr is None else swa_lr, alpha)
        return jnp.where(since < 0, base(step), annealed)

    return schedule


def linear_to_constant_schedule(
    init_value: float, swa_lr: float, start_step: int
) -> optax.Schedule:
    """Constant, then linear, then constant: the original repository's schedule.

    With ``x = t / start_step``::

        lr(t) = init_value                                             x <= 0.5
        lr(t) = init_value + (swa_lr - init_value) * (x - 0.5) / 0.4   0.5 < x < 0.9
        lr(t) = swa_lr                                                 x >= 0.9

    so the rate has settled by the time that averaging starts.

    Args:
      init_value: learning rate of the first half.
      swa_lr: learning rate from 0.9 ``start_step`` on.
      start_step: step at which averaging starts, >= 0; 0 gives ``swa_lr`` throughout.

    Returns:
      A schedule from the step to a float32 scalar.

    Raises:
      ValueError: a negative ``start_step`` or rate, or a rate that is not finite.
      TypeError: a ``start_step`` that is no integer, a rate that is no number.

    Example:
      >>> schedule = linear_to_constant_schedule(0.1, 0.05, start_step=100)
      >>> [round(float(schedule(step)), 4) for step in (0, 50, 70, 90, 100)]
      [0.1, 0.1, 0.075, 0.05, 0.05]

    References:
      ``train.py`` of https://github.com/timgaripov/swa; Izmailov et al., UAI 2018,
      https://arxiv.org/abs/1803.05407, appendix.
    """
    check_rate("init_value", init_value)
    check_rate("swa_lr", swa_lr)
    start_step = _check_length("start_step", start_step)

    def schedule(step: Any) -> jax.Array:
        # 0.5 and 0.9 of start_step, in floats: exact wherever they fall on a step.
        alpha = _alpha("linear", as_step(step) - start_step / 2, 2 * start_step / 5)
        return _blend(init_value, swa_lr, alpha)

    return schedule


def cyclic_schedule(
    max_value: float, min_value: float, cycle_steps: int
) -> optax.Schedule:
    """Saw-tooth from ``max_value`` down to ``min_value``: the paper's cyclical rate.

    For the 0-based step ``i`` and ``c = cycle_steps``::

        lr(i) = (1 - t) * max_value + t * min_value,   t = ((i mod c) + 1) / c

    A cycle ends at ``min_value``; that is where models are averaged:
    ``swa(start_step=c, period=c)`` takes the end of every cycle.

    Args:
      max_value: learning rate from which each cycle descends.
      min_value: learning rate of a cycle's last step.
      cycle_steps: steps in a cycle, >= 1; 1 gives ``min_value`` throughout.

    Returns:
      A schedule from the step to a float32 scalar.

    Raises:
      ValueError: ``cycle_steps < 1``, a rate that is negative or not finite.
      TypeError: a ``cycle_steps`` that is no integer, a rate that is no number.

    Example:
      >>> schedule = cyclic_schedule(0.05, 0.01, cycle_steps=4)
      >>> [round(float(schedule(step)), 4) for step in range(5)]
      [0.04, 0.03, 0.02, 0.01, 0.04]

    References:
      Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407, equation (1).
    """
    check_rate("max_value", max_value)
    check_rate("min_value", min_value)
    cycle_steps = _check_length("cycle_steps", cycle_steps, at_least=1)

    def schedule(step: Any) -> jax.Array:
        into = as_step(step) % cycle_steps + 1
        return _blend(max_value, min_value, _alpha("linear", into, cycle_steps))

    return schedule


def as_step(step: Any) -> jax.Array:
    """A step as an array in which steps can be subtracted and multiplied.

    Counters come in other dtypes too: that of ``flax.nnx.Optimizer`` is unsigned, and
    a step before ``start_step`` would be a huge one after it.
    """
    step = jnp.asarray(step)
    signed = jnp.issubdtype(step.dtype, jnp.signedinteger) and step.dtype.itemsize >= 4
    if not jnp.issubdtype(step.dtype, jnp.integer) or signed:
        return step
    return step.astype(jnp.result_type(int))


def _alpha(strategy: Strategy, elapsed: jax.Array, length: float) -> jax.Array:
    """Progress from 0 to 1 after ``elapsed`` of ``length`` steps."""
    if not length:
        return jnp.where(elapsed >= 0, 1.0, 0.0)
    x = jnp.clip(elapsed / length, 0.0, 1.0)
    return x if strategy == "linear" else (1 - jnp.cos(jnp.pi * x)) / 2


def _blend(start: Any, end: Any, alpha: jax.Array) -> jax.Array:
    # Flat where both ends agree. The far end is selected rather than computed: it may
    # come out a rounding off, and compilers may evaluate cos(pi) in more ways than one.
    return jnp.where(alpha >= 1, end, start + (end - start) * alpha)


def check_strategy(name: str, strategy: Any) -> None:
    """Raises unless ``strategy`` names an annealing curve."""
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, get_args(Strategy)))}, got "
            f"{strategy!r}"
        )


def _check_length(name: str, value: Any, *, at_least: int = 0) -> int:
    try:
        length = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer number of steps, got {value!r} of type "
            f"{type(value).__name__}; multiply epochs by the steps in an epoch, and "
            "round"
        ) from None
    if length < at_least:
        raise ValueError(
            f"{name} must be at least {at_least} (steps), got {length}; count "
            "optimizer updates from 0"
        )
    return length


def check_rate(name: str, rate: Any, or_else: str = "") -> None:
    """Raises unless ``rate`` is a learning rate, as far as its value is known.

    Args:
      name: the argument to name in the message.
      rate: what was given for it.
      or_else: what else it could have been, as in ``" or None"``.
    """
    number = np.ndim(rate) == 0 and (
        hasattr(rate, "__float__") and not isinstance(rate, bool | str)
    )
    if not number:
        raise TypeError(
            f"{name} must be a learning rate{or_else}, got {rate!r}; it is one number, "
            "and for a rate for each group of parameters there is optax.partition"
        )
    known = not isinstance(rate, jax.core.Tracer)
    if known and not (math.isfinite(float(rate)) and float(rate) >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {rate!r}; it is the learning "
            f"rate as the optimizer gets it{or_else and ','}{or_else}"
        )


def as_schedule(base: Any) -> Callable[[Any], Any]:
    """A learning rate, or a schedule, as a schedule."""
    if callable(base):
        return base
    check_rate("base", base, " or a schedule (step -> learning rate)")
    return functools.partial(_constant, base)


def _constant(value: Any, step: Any) -> jax.Array:
    del step
    return jnp.asarray(value)
