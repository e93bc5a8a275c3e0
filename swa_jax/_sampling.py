"""WHEN a model is averaged: from a start, every so often, to an end.

The one rule, for numbers and for values inside a trace. Optimizers count updates, the
recipe ends of epochs or of batches; both begin with 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from swa_jax._placement import is_traced
from swa_jax._validate import check_count


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Models number ``start``, ``start + period``, ... up to ``stop``.

    Attributes:
      start: number of the first model, >= 0; model 0, the initial weights, is none.
      period: from one to the next, >= 1.
      stop: number of the last that may be averaged; ``None`` for no end.
    """

    start: Any = 0  # int, or int32 scalar inside a trace, like the others
    period: Any = 1
    stop: Any = None

    @classmethod
    def of_updates(cls, start_step: Any, period: Any, stop_step: Any) -> "Sampling":
        """The same in optimizer updates, checked under a transformation's names."""

        def check(name: str, value: Any, at_least: int = 0) -> Any:
            hint = "steps count optimizer updates, so convert epochs or fractions first"
            return check_count(name, value, at_least=at_least, hint=hint, traced=True)

        start, every = check("start_step", start_step), check("period", period, 1)
        stop = stop_step if stop_step is None else check("stop_step", stop_step)
        known = not (is_traced(start) or is_traced(stop))
        if known and stop is not None and stop < start:
            raise ValueError(
                f"stop_step={stop} is before start_step={start}: nothing would ever be "
                "averaged; stop_step must be >= start_step, or None"
            )
        return cls(start, every, stop)

    @property
    def always(self) -> bool:
        """Whether every model is averaged, as far as is known outside a trace."""
        known = not any(map(is_traced, (self.start, self.period, self.stop)))
        return known and self.start <= 1 and self.period == 1 and self.stop is None

    def samples(self, number: Any) -> Any:
        """Whether model ``number``, counted from 1, is averaged: a bool, or an array.

        With ``number`` a NumPy or JAX array, of each in it.
        """
        due = (number >= self.start) & ((number - self.start) % self.period == 0)
        return due if self.stop is None else due & (number <= self.stop)

    def position(self, number: Any) -> Any:
        """How many models have had their turn by ``number``, that one included."""
        return (number - self.start) // self.period + 1

    def after(self, num_updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number of the update after so many, and whether it is averaged."""
        traced = map(is_traced, (num_updates, self.start, self.period, self.stop))
        # Eagerly, constants would be transfers from the host.
        return (_after if any(traced) else _eager_after)(self, num_updates)


def _after(when: Sampling, num_updates: jax.Array) -> tuple[jax.Array, jax.Array]:
    number = optax.safe_increment(num_updates)
    return number, jnp.asarray(when.samples(number))


_eager_after = jax.jit(_after, static_argnums=0)
