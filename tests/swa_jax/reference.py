"""Every average in NumPy's float64, from its definition, and how far off one may be.

It never calls swa_jax. A ``Ledger`` is told of each update what the library is told,
and keeps the models themselves: means are weighted sums of all of them, squares are
taken around that mean in a second pass, windows are the latest of the list.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

#: Half an ulp of float32, in which everything narrower is computed.
U = 2.0**-24


def precision(dtype: Any) -> Any:
    """``np.finfo``, of narrow types too."""
    return ml_dtypes.finfo(np.empty(0, dtype).real.dtype)


def is_floating(dtype: Any) -> bool:
    """Whether leaves are averaged; complex ones are."""
    try:
        precision(dtype)
    except ValueError:
        return False
    return True


def is_complex(dtype: Any) -> bool:
    return np.dtype(dtype).kind == "c"


def exact(x: np.ndarray) -> np.ndarray:
    """In float64, or complex128."""
    return np.asarray(x, np.complex128 if is_complex(x.dtype) else np.float64)


def rounding(dtype: Any) -> float:
    """Half an ulp of 1."""
    return float(precision(dtype).eps) / 2


def rounded(size: np.ndarray, dtype: Any) -> np.ndarray:
    """What rounding numbers of a size to ``dtype`` may change, also near 0."""
    return rounding(dtype) * size + float(precision(dtype).smallest_subnormal)


def width_of(sigma: float) -> float:
    """The exponent of a power average, by bisection of its profile's variance."""
    low, high = 0.0, 1e6  # the deviation falls with the exponent
    for _ in range(200):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma**2
        low, high = (middle, high) if wider else (low, middle)
    return low


@dataclasses.dataclass(frozen=True)
class Definition:
    """What makes an average.

    Attributes:
      rate: the share of the n-th model when it enters.
      window: how many models are kept, all alike; ``None`` for all.
      rank: how many deviations are kept beside the squares; ``None`` for no squares.
      compensated: whether the mean is good to the last place.
    """

    rate: Callable[[int], float] = lambda n: 1 / n
    window: int | None = None
    rank: int | None = None
    compensated: bool = False


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When models enter: the options of every average, in their own words."""

    start_step: int = 0
    period: int = 1
    stop_step: int | None = None
    skip_nonfinite: bool = False

    def takes(self, number: int) -> bool:
        """Whether update ``number``, the first being 1, is averaged."""
        last = number if self.stop_step is None else self.stop_step
        return number in range(self.start_step, last + 1, self.period)


@dataclasses.dataclass
class Expected:
    """Numbers, and by how much each may be off.

    Attributes:
      value: float64, complex128, or what is not averaged as it is.
      off: the bound; ``None`` where every bit must be the same.
      lost: where there must be no finite number.
    """

    value: np.ndarray
    off: np.ndarray | None
    lost: np.ndarray

    def check(self, found: Any, name: str) -> None:
        """Raises unless ``found`` is this, rounded once to its own dtype."""
        found = np.asarray(found)
        assert found.shape == self.value.shape, name
        if self.off is None:
            self._check_bits(found, name)
            return
        assert not np.isfinite(exact(found)[self.lost]).any(), f"{name}: not lost"
        kept = ~self.lost
        value, got = self.value[kept], exact(found)[kept]
        off = self.off[kept] + rounded(np.abs(value) + self.off[kept], found.dtype)
        wrong = ~(np.abs(got - value) <= off)
        assert not wrong.any(), (
            f"{name}: found {got[wrong]}, expected {value[wrong]} within {off[wrong]}"
        )

    def _check_bits(self, found: np.ndarray, name: str) -> None:
        """All but the payload of a NaN, which a choice in bfloat16 may lose."""
        assert found.dtype == self.value.dtype, name
        nan = np.zeros(found.shape, bool)
        if is_floating(found.dtype):
            nan = np.isnan(exact(self.value))
            np.testing.assert_array_equal(np.isnan(exact(found)), nan, name)
        assert found[~nan].tobytes() == self.value[~nan].tobytes(), name


@dataclasses.dataclass
class Leaf:
    """The books of one leaf: its models, and what rounding may have done so far."""

    dtype: Any  # that it began with
    models: list[np.ndarray] = dataclasses.field(default_factory=list)
    largest: Any = 0.0
    off: Any = 0.0  # of the mean
    lost: Any = False
    squares_off: Any = 0.0
    deviations: list[Expected] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Ledger:
    """An average of models, as it ought to be.

    Attributes:
      definition: what it is.
      schedule: when models enter.
      dtypes: those of the leaves when the average began.
      accumulator: the dtype that was asked for.
      seen: updates.
      averaged: models that entered.
      weights: what each of them counts for.
      leaves: leaf by leaf.
    """

    definition: Definition
    schedule: Schedule
    dtypes: list[Any]
    accumulator: Any = None
    seen: int = 0
    averaged: int = 0
    weights: list[float] = dataclasses.field(default_factory=list)
    leaves: list[Leaf] = dataclasses.field(default_factory=list)

    def copy(self) -> "Ledger":
        return copy.deepcopy(self)

    def see(self, model: list[np.ndarray], *, sample: bool = True) -> None:
        """One update later, whose weights are ``model``."""
        self.seen += 1
        floats = [exact(x) for x in model if is_floating(x.dtype)]
        finite = all(np.isfinite(x).all() for x in floats)
        skipped = self.schedule.skip_nonfinite and not finite
        if sample and not skipped and self.schedule.takes(self.seen):
            self._enter(model)

    def _enter(self, model: list[np.ndarray]) -> None:
        self.averaged += 1
        n, window = self.averaged, self.definition.window
        rate = min(max(self.definition.rate(n), 0.0), 1.0) if n > 1 else 1.0
        self.weights = [(1 - rate) * w for w in self.weights] + [rate]
        if window is not None:
            self.weights = [float(i >= n - window) / min(n, window) for i in range(n)]
        self.leaves = self.leaves or [Leaf(dtype) for dtype in self.dtypes]
        for leaf, new in zip(self.leaves, model, strict=True):
            self._enter_leaf(leaf, new, rate)

    def _enter_leaf(self, leaf: Leaf, new: np.ndarray, rate: float) -> None:
        window = self.definition.window
        if window is not None and is_floating(new.dtype):
            new = new.astype(self.row_as(leaf.dtype))
        leaf.models.append(new)
        if not is_floating(new.dtype):
            return
        value, n = exact(new), self.averaged
        bad = ~np.isfinite(value)
        # A model that replaces all before it leaves nothing of them.
        leaf.lost = bad | (leaf.lost & (rate < 1))
        size = np.where(bad, 0.0, np.abs(value))
        leaf.largest = np.maximum(leaf.largest, size)
        stored = rounded(leaf.largest, self.kept_as(leaf.dtype))
        # Of a step rate * (q - mean), of size 2 rate at most: the difference and the
        # product round, and the rate is good to eight (its powers come from exp and
        # log); the sum rounds as the result does, and once more if kept narrower.
        step = U * (1 + 20 * rate) * leaf.largest + stored
        leaf.off = (1 - rate) * leaf.off + (stored if rate == 1 else step)
        if self.definition.rank is not None:
            self._spread(leaf, value, n, stored)

    def _spread(self, leaf: Leaf, value: np.ndarray, n: int, stored: Any) -> None:
        """SWAG's row of this model, and the error of its square."""
        with np.errstate(invalid="ignore"):
            apart = np.where(leaf.lost, 0.0, np.abs(value - self._mean(leaf)))
            row = np.where(leaf.lost, np.nan, value - self._mean(leaf))
        off, share = leaf.off + U * (apart + leaf.largest), n / max(n - 1, 1)
        kept = self.kept_as(leaf.dtype)
        leaf.deviations.append(Expected(row, off, leaf.lost.copy()))
        # By parts, of a complex number: each as far off as the whole.
        added = share * (2 * apart * off + off**2) + 8 * U * share * apart**2
        total = np.abs(self._squares(leaf))
        leaf.squares_off = leaf.squares_off + added + 2 * rounded(total, kept)

    def kept_as(self, dtype: Any) -> Any:
        """The dtype of the mean: never narrower than float32 unless asked for."""
        if is_complex(dtype):
            return dtype
        narrow = precision(dtype).bits < 32
        return self.accumulator or (np.float32 if narrow else dtype)

    def row_as(self, dtype: Any) -> Any:
        """The dtype of a window: the weights' own unless asked for."""
        asked = self.accumulator is not None and not is_complex(dtype)
        return self.accumulator if asked else dtype

    # What it is now.

    def means(self) -> list[Expected]:
        """The average, leaf by leaf; there must be some model."""
        return [self._expected(leaf) for leaf in self.leaves]

    def _expected(self, leaf: Leaf) -> Expected:
        last = leaf.models[-1]
        if not is_floating(last.dtype):
            return Expected(last, None, np.zeros(last.shape, bool))
        lost, off = leaf.lost, leaf.off
        if (window := self.definition.window) is not None:
            rows = np.stack([exact(x) for x in leaf.models[-window:]])
            lost = ~np.isfinite(rows).all(0)
            # Sums of differences from one of the rows, each of size 2.
            off = 2 * (len(rows) + 4) * U * leaf.largest
        if self.definition.compensated:
            # Half a place of each word, and steps that round, of size 2 / n.
            steps = sum(1 / k for k in range(1, self.averaged + 1))
            off = 2 * rounded(leaf.largest, self.kept_as(leaf.dtype))
            off = off + 8 * U * steps * leaf.largest
        return Expected(self._mean(leaf), np.asarray(off), lost)

    def _mean(self, leaf: Leaf) -> np.ndarray:
        pairs = zip(self.weights, leaf.models, strict=True)
        with np.errstate(invalid="ignore"):
            return np.sum([w * exact(x) for w, x in pairs if w], axis=0)

    def _squares(self, leaf: Leaf) -> np.ndarray:
        mean = self._mean(leaf)
        with np.errstate(invalid="ignore"):
            apart = np.stack([exact(x) - mean for x in leaf.models])
            apart = np.where(leaf.lost, 0.0, apart)
        if np.iscomplexobj(apart):
            return np.sum(apart.real**2, 0) + 1j * np.sum(apart.imag**2, 0)
        return np.sum(apart**2, 0)

    def squares(self) -> list[Expected | None]:
        """SWAG's sums of squared deviations; ``None`` where there are none."""
        return [
            Expected(self._squares(leaf), leaf.squares_off, leaf.lost)
            if is_floating(leaf.models[-1].dtype)
            else None
            for leaf in self.leaves
        ]

    def rows(self) -> list[dict[int, Expected] | None]:
        """Of a window the models, of SWAG the deviations, by their row."""
        size = self.definition.window or self.definition.rank or 0
        everything: list[dict[int, Expected] | None] = []
        for leaf in self.leaves:
            entries = leaf.deviations
            if self.definition.window is not None:
                entries = [
                    Expected(x, None, np.zeros(x.shape, bool)) for x in leaf.models
                ]
            elif not is_floating(leaf.models[-1].dtype):
                everything.append(None)
                continue
            everything.append({i % size: x for i, x in enumerate(entries) if size})
        return everything
