"""Learning-rate schedules that weight averaging is used with.

Each is an ``optax.Schedule``: a pure function from the 0-based step (a Python number,
or an array of any integer dtype, traced or not) to the learning rate, a float scalar:
float32, or float64 where a step or rate has 64 bits and JAX has them on. All are exact
at their boundaries: where a schedule promises ``swa_lr``, it returns that very float.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from swa_jax._validate import check_count, check_rate, shown
from swa_jax.typing import Rate, Strategy

_check_steps = functools.partial(
    check_count,
    at_least=0,
    boolean=True,
    hint="it is a number of optimizer updates; multiply epochs by the steps in an "
    "epoch, and round",
)


def cosine_to_constant_schedule(
    init_value: Rate, swa_lr: Rate, decay_steps: int, *, warmup_steps: int = 0
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
      A schedule from the step to a float scalar.

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
    decay_steps = _check_steps("decay_steps", decay_steps)
    warmup_steps = _check_steps("warmup_steps", warmup_steps)
    if warmup_steps > decay_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is more than decay_steps={decay_steps}; "
            "decay_steps counts from step 0 and includes the warm-up"
        )

    @scalar_arithmetic()
    def schedule(step: Any) -> jax.Array:
        step = as_step(step)
        lr = _blend(
            init_value,
            swa_lr,
            _alpha("cos", step - warmup_steps, decay_steps - warmup_steps),
        )
        if warmup_steps:
            rising = _wide(init_value) * _ratio(step, warmup_steps)
            lr = jnp.where(step < warmup_steps, rising, lr)
        return lr

    return schedule


def swa_schedule(
    base: optax.ScalarOrSchedule,
    swa_lr: Rate | None,
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
    start_step = _check_steps("start_step", start_step)
    anneal_steps = _check_steps("anneal_steps", anneal_steps)
    update_every = _check_steps("update_every", update_every, at_least=1)
    check_strategy("strategy", strategy)
    base = as_schedule(base)

    @scalar_arithmetic()
    def schedule(step: Any) -> jax.Array:
        step = as_step(step)
        lr0 = base(jnp.asarray(start_step, step.dtype))
        since = step - start_step
        held = since - since % update_every
        annealed = anneal(lr0, swa_lr, held, anneal_steps, strategy)
        return jnp.where(since < 0, base(step), annealed)

    return schedule


def linear_to_constant_schedule(
    init_value: Rate, swa_lr: Rate, start_step: int
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
      A schedule from the step to a float scalar.

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
    start_step = _check_steps("start_step", start_step)

    @scalar_arithmetic()
    def schedule(step: Any) -> jax.Array:
        # 0.5 and 0.9 of start_step, in floats: exact wherever they fall on a step.
        past_half = _ratio(as_step(step), 1) - start_step / 2
        alpha = _alpha("linear", past_half, 2 * start_step / 5)
        return _blend(init_value, swa_lr, alpha)

    return schedule


def cyclic_schedule(
    max_value: Rate, min_value: Rate, cycle_steps: int
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
      A schedule from the step to a float scalar.

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
    cycle_steps = _check_steps("cycle_steps", cycle_steps, at_least=1)

    @scalar_arithmetic()
    def schedule(step: Any) -> jax.Array:
        into = as_step(step) % cycle_steps + 1
        return _blend(max_value, min_value, _alpha("linear", into, cycle_steps))

    return schedule


@contextlib.contextmanager
def scalar_arithmetic() -> Iterator[None]:
    """What scalars may do where JAX is set to be strict; also a decorator.

    Integers of a step and floats of a rate are mixed on purpose, and a Python number on
    its way to the device is no accident.
    """
    with jax.numpy_dtype_promotion("standard"), jax.transfer_guard("allow"):
        yield


def as_step(step: Any) -> jax.Array:
    """A step as an array in which steps can be subtracted and multiplied.

    Counters come in other dtypes too: that of ``flax.nnx.Optimizer`` is unsigned, and
    a step before ``start_step`` would be a huge one after it.

    Raises:
      ValueError: a number that JAX would wrap around.
    """
    if not isinstance(step, jax.Array):
        number = np.asarray(step)
        most = _most(number.dtype.itemsize)
        if number.dtype.kind in "iuO" and np.any((number > most) | (number < -most)):
            raise ValueError(
                f"step must be at most {most}, got {shown(step)}; JAX's integers hold "
                "no more"
            )
    step = jnp.asarray(step)
    size = step.dtype.itemsize
    if jnp.issubdtype(step.dtype, jnp.floating):
        return step if size >= 4 else step.astype(jnp.float32)
    if jnp.issubdtype(step.dtype, jnp.signedinteger) and size >= 4:
        return step
    if jnp.issubdtype(step.dtype, jnp.integer) and size >= 4:
        step = jnp.minimum(step, _most(size))  # it stays, as optax's counters do
    return step.astype(jnp.int64 if size == 8 else jnp.int32)


def _most(size: int) -> int:
    """The largest integer that JAX keeps of one of so many bytes."""
    return int(jnp.iinfo(jnp.result_type(int) if size == 8 else jnp.int32).max)


def anneal(
    lr0: Any, swa_lr: Any, elapsed: jax.Array, length: float, strategy: Strategy
) -> jax.Array:
    """From ``lr0`` to ``swa_lr``, or ``lr0`` still, ``elapsed`` of ``length`` along."""
    return _blend(
        lr0, lr0 if swa_lr is None else swa_lr, _alpha(strategy, elapsed, length)
    )


def _alpha(strategy: Strategy, elapsed: jax.Array, length: float) -> jax.Array:
    """Progress from 0 to 1 after ``elapsed`` of ``length`` steps."""
    if not length:
        return jnp.where(elapsed >= 0, 1.0, 0.0)
    x = jnp.clip(_ratio(elapsed, length), 0.0, 1.0)
    return x if strategy == "linear" else (1 - jnp.cos(jnp.pi * x)) / 2


def _ratio(steps: jax.Array, length: float) -> jax.Array:
    # By an integer first: so it becomes a float of the step's own width, whereas a
    # Python float would make float64 of any, and an integer may be too large for int32.
    return jnp.true_divide(steps, 1) / float(length)


def _blend(start: Any, end: Any, alpha: jax.Array) -> jax.Array:
    # Flat where both ends agree. The far end is selected rather than computed: it may
    # come out a rounding off, and compilers may evaluate cos(pi) in more ways than one.
    start, end = _wide(start), _wide(end)
    return jnp.where(alpha >= 1, end, start + (end - start) * alpha)


def _wide(rate: Any) -> Any:
    """A rate in which the way to another can be computed: float32 at least."""
    dtype = getattr(rate, "dtype", None)
    if dtype is None:
        return float(rate)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.asarray(rate, jnp.float32) if narrow else rate


def check_strategy(name: str, strategy: Any) -> None:
    """Raises unless ``strategy`` names an annealing curve."""
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, get_args(Strategy)))}, got "
            f"{shown(strategy)}"
        )


def as_schedule(base: Any) -> Callable[[Any], Any]:
    """A learning rate, or a schedule, as a schedule."""
    if callable(base):
        return base
    check_rate("base", base, " or a schedule (step -> learning rate)")
    return functools.partial(_constant, _wide(base))


def _constant(value: Any, step: Any) -> jax.Array:
    del step
    return jnp.asarray(value)
