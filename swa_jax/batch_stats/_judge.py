"""Whether what came out of a run can be believed, and the words if it cannot."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from swa_jax.batch_stats import _share as shares
from swa_jax.batch_stats._forward import Layout, old_value_codes, second_half
from swa_jax.batch_stats._leaves import Name, some
from swa_jax.batch_stats._share import OWN, ZERO, Segments, places
from swa_jax.errors import NonFiniteError

#: The smallest number that float16 holds with all its digits.
_LEAST_HALF = float(jnp.finfo(jnp.float16).tiny)


class Verdict(NamedTuple):
    """What one batch did, on every device of the axis (one, if there is none).

    Attributes:
      values: its own statistics, shape (devices, elements).
      terms: ``share * values``, what the model added.
      touched: bool, shape (devices, leaves): whether it passed through the layer.
      share: float, the same shape: ``1 - a``.
      trouble: for each leaf that cannot be believed, the exception to raise.
    """

    values: np.ndarray
    terms: np.ndarray
    touched: np.ndarray
    share: np.ndarray
    trouble: dict[int, ValueError]


class Judge:
    """Judges runs in one layout."""

    def __init__(
        self,
        layout: Layout,
        names: list[Name],
        dtypes: list[Any],
        wider: list[Any],
        own: list[np.ndarray],
    ) -> None:
        """Prepares what does not change from run to run.

        Args:
          layout: how the model is run.
          names: of the moved leaves, like all that follows.
          dtypes: what they are stored in.
          wider: what the model computes them in.
          own: their values, shape (devices of this process, *shape).
        """
        self.names = names
        self.dtypes = [jnp.finfo(dtype).dtype for dtype in dtypes]
        self.wider = [jnp.finfo(dtype).dtype for dtype in wider]
        self.halves = [i for i, x in enumerate(self.dtypes) if x == np.float16]
        self.eps = np.array([float(jnp.finfo(dtype).eps) for dtype in wider])
        lengths = [flat([x[:1]], 1).shape[1] for x in own]
        self.at = Segments.of(lengths)
        self.start = self.at.spread(np.asarray(layout.far))
        self.own = flat(own, 1).astype(np.float64)
        self.codes = old_value_codes(len(names))
        halves = [second_half(x.shape[1:]) for x in own]
        pairs = [1 + np.iscomplexobj(x) for x in own]
        self.moves = np.concatenate(
            [
                np.repeat(np.where(half.reshape(-1, 1), *code[::-1, None]), pair, 0)
                for half, code, pair in zip(halves, self.codes, pairs, strict=True)
            ]
        ).T
        self.rows = self.own[:, None]
        self._expected: tuple[Any, ...] = (b"",)
        self._known: dict[tuple[float, Any, Any], float | None] = {}

    @np.errstate(all="ignore")
    def resize(self, sizes: np.ndarray) -> None:
        """Takes positive values of the statistics' own size, shape (elements,)."""
        coded = np.where(self.moves, sizes, 0)
        fixed = [np.zeros_like(self.start), self.start]
        self.rows = np.array([[*fixed, own, *coded] for own in self.own])
        self._expected = (b"",)

    @np.errstate(all="ignore")  # also where the user wants errors of NumPy's
    def judge(
        self,
        out: np.ndarray,
        everywhere: np.ndarray,
        here: np.ndarray,
        there: np.ndarray,
        which: str,
    ) -> Verdict:
        """Judges one run from all old values.

        Args:
          out: shape (devices of this process, old values, elements).
          everywhere: the first two old values on all devices of the axis.
          here: bool, shape (devices of this process,): those that have any data.
          there: bool, the same for all devices of the axis.
          which: what to call the batch.
        """
        per_device = [
            shares.read_momenta(zero, far, self.start, self.eps, self.at)
            for zero, far in everywhere.astype(np.float64)
        ]
        touched = np.array([~momenta.idle for momenta in per_device])
        # Where it cannot be told: None, which becomes NaN.
        share = np.array([self._share_of(m) for m in per_device], float)
        trouble: dict[int, ValueError] = {}
        for device in places(there):
            momenta, row = per_device[device], share[device]
            for leaf in places(np.isnan(row) & ~momenta.idle):
                trouble[leaf] = self._cannot_be_told(leaf, float(momenta.old[leaf]))
            for leaf in places(~momenta.constant & ~momenta.idle):
                trouble[leaf] = self._no_average(leaf)
        for zero, leaf in itertools.product(everywhere[there, ZERO], self.halves):
            term = np.abs(zero[self.at.slice(leaf)])
            if 0 < term.min(where=term > 0, initial=np.inf) < _LEAST_HALF:
                trouble.setdefault(leaf, self._cannot_be_told(leaf, None))
        for device in places(here):
            one = out[device]
            zero, far = one[:2].astype(np.float64)
            momenta = shares.read_momenta(zero, far, self.start, self.eps, self.at)
            if not self._plainly_holds(device, one, momenta.old):
                one, rows = one.astype(np.float64), self.rows[device]
                found = shares.check_rows(one, rows, momenta, self.eps, self.at)
                trouble.update(self._troubles(found, one, which))
        divisors = np.array([self.at.spread(s) for s in share])
        terms = everywhere[:, ZERO]
        share = np.where(touched, share, 0)
        return Verdict(terms / divisors, terms, touched, share, trouble)

    def _plainly_holds(self, device: int, out: np.ndarray, old: np.ndarray) -> bool:
        """Whether one look shows that there is nothing to find, as there mostly is.

        Stricter than ``check_rows``, and several times faster, in the statistics' own
        precision.
        """
        if self._expected[0] != old.tobytes():
            expected = self.at.spread(old) * self.rows[:, OWN:]
            roundings = shares.ROUNDINGS / 2 * self.at.spread(self.eps)
            slack = roundings * np.abs(self.rows[:, OWN:])
            more = np.where(self.own, roundings, 0)
            all_three = (x.astype(out.dtype) for x in (expected, slack, more))
            self._expected = (old.tobytes(), *all_three)
        _, expected, slack, more = self._expected
        off = out[OWN:] - out[ZERO]
        off -= expected[device]
        np.abs(off, out=off)
        # The values of before may be much smaller than the statistics of this batch.
        off[0] -= more[device] * np.abs(out[ZERO])
        # NaN and infinity fail.
        return bool((off <= slack[device]).all() and np.isfinite(out[ZERO]).all())

    @np.errstate(all="ignore")
    def judge_briefly(self, zero: np.ndarray, known: Verdict) -> Verdict | None:
        """Takes a run from 0 alone to have the shares of an earlier one.

        Args:
          zero: on all devices of the axis, shape (devices, elements).
          known: of the earlier run.

        Returns:
          ``None`` if a leaf looks otherwise than then, so that it must be seen.
        """
        some_value = np.array([self.at.largest(np.abs(one)) for one in zero])
        if not np.isfinite(some_value).all():
            return None
        if ((some_value > 0) != known.touched).any():
            return None
        share = np.array([self.at.spread(s) for s in known.share])
        return known._replace(values=zero / share, terms=zero)

    def _share_of(self, momenta: shares.Momenta) -> list[float | None]:
        found = []
        for leaf, old in enumerate(momenta.old):
            key = old, self.dtypes[leaf], self.wider[leaf]
            if key not in self._known:
                self._known[key] = shares.share(*key) if np.isfinite(old) else None
            found.append(self._known[key])
        return found

    def _troubles(
        self, found: shares.Check, out: np.ndarray, which: str
    ) -> dict[int, ValueError]:
        finite_own = self.at.least(np.isfinite(out[OWN]))
        trouble: dict[int, ValueError] = {}
        for leaf in places(~found.affine):
            trouble[leaf] = self._no_average(leaf)
        for leaf in places(~found.alone):
            trouble[leaf] = self._follows(leaf, found.seen[:, leaf])
        for leaf in places(~found.finite):
            # From its own values it is a number: then it is the 0 of another leaf.
            followed = finite_own[leaf]
            trouble[leaf] = (
                self._follows(leaf, np.zeros(len(out), bool))
                if followed
                else self.not_finite(leaf, which)
            )
        return trouble

    def not_finite(self, leaf: int, which: str) -> NonFiniteError:
        """The error for NaN or infinity in a leaf."""
        return NonFiniteError(
            f"batch_stats_fn: {self.names[leaf].path} is not finite after {which}; "
            "check params and the batch for NaN and infinity"
        )

    def _no_average(self, leaf: int) -> ValueError:
        return ValueError(
            f"batch_stats_fn: {self.names[leaf].path} is not a running average, new = "
            "a * old + (1 - a) * batch with one a, 0 <= a < 1; statistics of another "
            "form cannot be recomputed from the forward pass alone. Leave it as it is "
            f"with keep={self.names[leaf].short!r}; a counter must have an integer "
            "dtype"
        )

    def _cannot_be_told(self, leaf: int, old: float | None) -> ValueError:
        dtype = self.wider[leaf]
        if old is None:
            what = "(1 - a) * batch is so small that float16 has lost digits of it"
        else:
            what = (
                f"1 - a is not known from a = {old:.9g} in {dtype}, rounded from a "
                "number that is no short decimal, 1 - 2**-k or 1 - 1/n"
            )
        return ValueError(
            f"batch_stats_fn: {self.names[leaf].path} is not a running average whose "
            f"share of the batch can be told: {what}. Hold batch_stats in a wider "
            "dtype, give the model a momentum of that kind, or, if it averages by a "
            "counter, start from statistics with that counter at 0; or leave the leaf "
            f"as it is with keep={self.names[leaf].short!r}"
        )

    def _follows(self, leaf: int, seen: np.ndarray) -> ValueError:
        """The error for a leaf that moves with others.

        Args:
          leaf: its number.
          seen: bool, shape (old values,): in which it moved though it was held at 0.
        """
        seen = seen[shares.CODED :]
        still = ~self.codes[leaf].all(0)[: len(seen)]
        fits = [
            other
            for other, code in enumerate(self.codes)
            for moves in code
            if seen.any() and seen[moves & still].all() and (moves & still).any()
        ]
        others = [self.names[i] for i in dict.fromkeys(fits) if i != leaf]
        with_what = some(others) if others else "other statistics"
        return ValueError(
            f"batch_stats_fn: {self.names[leaf].path} is not a running average of the "
            f"batch alone: it also follows {with_what}, as in a layer that normalises "
            "by running statistics in training, or an average that is derived from "
            "another. It cannot be recomputed from the forward pass alone. Run the "
            "model so that it normalises by the batch, or leave the leaf as it is with "
            f"keep={self.names[leaf].short!r} (and compute it from what it follows)"
        )


def flat(arrays: list[np.ndarray], leading: int) -> np.ndarray:
    """All elements in one vector, behind ``leading`` axes; complex ones as pairs.

    In float32 if that holds them all, else in float64.
    """
    parts = []
    for x in arrays:
        if np.iscomplexobj(x):
            x = np.stack([x.real, x.imag], -1)
        x = x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
        parts.append(x.reshape(*x.shape[:leading], -1))
    return np.concatenate(parts, -1)
