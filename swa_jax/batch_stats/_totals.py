"""Statistics of many batches from those of each."""

import numpy as np

from swa_jax.batch_stats._share import Segments


class Totals:
    """Running means over batches, each leaf with weights of its own, in float64.

    For the union of a set of share 1 - f with mean M and variance V and one of share f
    with m and v: mean M + f (m - M), variance V + f (v - V) + f (1 - f) |m - M|**2.
    """

    def __init__(self, at: Segments, mean_of: dict[int, int]) -> None:
        """Starts with no batch.

        Args:
          at: where each leaf lies; a complex one as pairs of real numbers.
          mean_of: for each variance whose spread between batches counts, its mean.
        """
        self.at = at
        self.mean_of = mean_of
        self.weights = np.zeros(len(at.starts))
        self.batches = np.zeros(len(at.starts), int)
        self.values = np.zeros(int(at.lengths.sum()))
        self.least = np.zeros(len(at.starts))

    @np.errstate(all="ignore")
    def add(self, values: np.ndarray, touched: np.ndarray, weight: float) -> None:
        """Adds one batch.

        Args:
          values: its own statistics; those of leaves that it did not touch may be
            anything.
          touched: bool, shape (leaves,).
          weight: its weight, above 0.
        """
        self.weights += np.where(touched, weight, 0)
        self.batches += touched
        fraction = np.where(touched, weight / np.maximum(self.weights, weight), 0)
        values = np.where(self.at.spread(touched), values, self.values)
        growth = values - self.values
        for variance, mean in self.mean_of.items():
            part, centre = self.at.slice(variance), self.at.slice(mean)
            apart = np.square(growth[centre]).reshape(part.stop - part.start, -1)
            values[part] += (1 - fraction[variance]) * apart.sum(-1)
        self.values += self.at.spread(fraction) * (values - self.values)
        smallest = np.where(touched, self.at.least(values), np.inf)
        self.least = np.minimum(self.least, smallest)
