"""The method's hyperparameters, and what both of its forms work out from them.

Both ask one ``Window`` when to sample and one anneal for the rate, so they average the
same models and give the same learning rates.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from swa_jax._validate import check_count, check_rate, shown
from swa_jax.recipe._timing import Length, Window, parse_time, window
from swa_jax.schedules import anneal, check_strategy
from swa_jax.typing import Rate, Strategy


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters, see ``SWA``."""

    swa_start: float | str = 0.8
    anneal_epochs: int = 10
    swa_lr: Rate | None = None
    _: dataclasses.KW_ONLY
    anneal_strategy: Strategy = "cos"
    swa_end: str | None = None
    update_interval: str = "1ep"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        _check_start(self.swa_start)
        check_count("anneal_epochs", self.anneal_epochs)
        if self.swa_lr is not None:
            check_rate("swa_lr", self.swa_lr, " or None to hold the rate")
        check_strategy("anneal_strategy", self.anneal_strategy)
        if self.swa_end is not None:
            parse_time("swa_end", self.swa_end)
        interval = parse_time("update_interval", self.update_interval)
        if interval.unit == "dur" or not interval.value:
            raise ValueError(
                "update_interval must be at least one epoch or batch, such as "
                f'"1ep" or "100ba", got {self.update_interval!r}'
            )
        if not isinstance(self.skip_nonfinite, bool | np.bool_):
            raise TypeError(
                "skip_nonfinite must be True or False, got "
                f"{shown(self.skip_nonfinite)}"
            )

    def window(self, length: Length) -> Window:
        """Which models of a run are averaged."""
        return window(self.swa_start, self.swa_end, self.update_interval, length)

    def annealed(self, lr0: Any, number: Any, length: Length) -> jax.Array:
        """The rate once so many models have had their turn in the average."""
        interval = parse_time("update_interval", self.update_interval)
        epoch = 1 if interval.unit == "ep" else length.steps("update_interval")
        intervals = self.anneal_epochs * epoch / interval.value
        return anneal(lr0, self.swa_lr, number, float(intervals), self.anneal_strategy)

    def tick_size(self, length: Length) -> int:
        """Optimizer updates from one tick to the next."""
        by_epoch = parse_time("update_interval", self.update_interval).unit == "ep"
        return length.steps("optimizer updates") if by_epoch else 1


def _check_start(start: Any) -> None:
    if isinstance(start, str):
        if not parse_time("swa_start", start).value:
            raise ValueError(
                f"swa_start must be later than the start of training, got {start!r}: "
                'initial weights are never averaged; "1ep" averages the first epoch on'
            )
        return
    fix = 'give a time string, as in "8ep", to start after 8 epochs'
    number = np.ndim(start) == 0 and hasattr(start, "__float__")
    if isinstance(start, bool) or not number:
        raise TypeError(
            "swa_start must be a fraction of training or a time string, got "
            f"{shown(start)}"
        )
    if not 0 < float(start) < 1:
        raise ValueError(f"swa_start must be in (0, 1), got {shown(start)}; {fix}")
