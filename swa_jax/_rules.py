"""WHAT each running average gives its newcomer.

With ``q`` the n-th model averaged, every running average is

    mean += rate(n) * (q - mean),

the first model replacing the mean. A rule says ``1 / rate(n)``, by which to divide: for
the equal mean that is ``n`` itself, exactly. Rates are computed in the width of the
leaf that they are for, from ``1 - decay`` in Python's float64 where the decay is known:
in float32, 1 - 0.9999 is off by 1.7e-4.

Rules compare by value, so that equal ones share a compiled program, and compute with
NumPy where ``n`` is a NumPy array.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from swa_jax.typing import Decay


class Rule(Protocol):
    """A running average."""

    def divisor(self, n: Any, dtype: DTypeLike) -> Any:
        """``1 / rate(n)`` in ``dtype``, for an int32 array ``n``."""


@dataclasses.dataclass(frozen=True)
class Equal:
    """1 / n: every model counts the same."""

    def divisor(self, n: Any, dtype: DTypeLike) -> Any:
        """See ``Rule``."""
        return n.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """(1 - b) / (1 - b**n), or 1 - b; b a number in [0, 1), also traced."""

    decay: Any
    debias: bool

    def divisor(self, n: Any, dtype: DTypeLike) -> Any:
        """See ``Rule``."""
        xp = _module(n)
        log: Any
        if isinstance(self.decay, float):
            left = 1 - self.decay
            log = math.log(self.decay) if self.decay else -math.inf
        else:
            left = 1 - self.decay.astype(dtype)
            log = jnp.log1p(-left)
        if not self.debias:
            return xp.asarray(1 / left, dtype)
        # expm1 keeps the digits that 1 - b**n loses while n is small.
        return -xp.expm1(n.astype(dtype) * xp.asarray(log, dtype)) / left


@dataclasses.dataclass(frozen=True)
class Varying:
    """1 - b(n)."""

    decay: Decay

    def divisor(self, n: Any, dtype: DTypeLike) -> Any:
        """See ``Rule``."""
        if isinstance(self.decay, Warmup):
            return 1 / self.decay.complement(n, dtype)
        decay: Any = self.decay
        rate = 1 - _module(n).asarray(decay(n), dtype)
        return 1 / rate.clip(0, 1)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """b(n) = clip(1 - (1 + (n - 1) / inv_gamma)**-power, min_decay, decay)."""

    decay: float
    inv_gamma: float
    power: float
    min_decay: float

    def __call__(self, n: Any) -> Any:
        """The decay when the n-th model enters."""
        n = n if isinstance(n, jax.Array) else np.asarray(n)
        return 1 - self.complement(n, jnp.result_type(float))

    def complement(self, n: Any, dtype: DTypeLike) -> Any:
        """1 - b(n), with all its digits."""
        earlier = (n - 1).astype(dtype) / self.inv_gamma
        rate = _module(n).exp(-self.power * _module(n).log1p(earlier))
        return rate.clip(1 - self.decay, 1 - self.min_decay)


@dataclasses.dataclass(frozen=True)
class Power:
    """1 - (1 - 1/n)**(gamma + 1): models count by n**gamma, in the limit."""

    gamma: Any  # a number, also traced

    def divisor(self, n: Any, dtype: DTypeLike) -> Any:
        """See ``Rule``."""
        xp = _module(n)
        # Of the first model it is 1; log(0) would give gamma a derivative of NaN.
        log = xp.log1p(-1 / n.astype(dtype).clip(2))
        return xp.where(n > 1, -1 / xp.expm1((self.gamma + 1) * log), 1)


def gamma_of(sigma_rel: float) -> float:
    """The ``gamma`` of a power average whose profile has this relative deviation.

    The profile on [0, 1], ``(gamma + 1) * t**gamma``, has the variance
    ``(gamma + 1) / ((gamma + 2)**2 * (gamma + 3))``.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def _module(n: Any) -> Any:
    return np if isinstance(n, np.ndarray | np.generic) else jnp
