"""What a network's BatchNorm layers see, in NumPy's float64: the frameworks' oracle."""

import numpy as np

#: Inputs of 3 features, the last batch smaller, the batches unlike each other.
BATCHES = [
    np.random.default_rng(i).normal(i - 1, 1 + i, size=(n, 3)).astype(np.float32)
    for i, n in enumerate((16, 16, 7))
]
#: Of float32 sums over 39 rows, through two layers; the issue's own bound.
TOLERANCE = 1e-5


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def batch_norm(x, scale, bias, eps):
    """``x`` normalised by its own statistics, biased variance, over the rows."""
    return (x - x.mean(0)) / np.sqrt(x.var(0) + eps) * f64(scale) + f64(bias)


def population(rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over the rows of all batches."""
    everything = np.concatenate(rows)
    return everything.mean(0), everything.var(0)


def two_layers(first, norm, second, eps, batches=BATCHES, hidden=np.tanh):
    """Populations that the norms of linear, norm, hidden, linear, norm see.

    Args:
      first: kernel (in, out) and bias of the first linear layer.
      norm: scale and bias of the first norm.
      second: as ``first``.
      eps: of the first norm.
      batches: of inputs.
      hidden: what comes after the first norm.
    """
    before = [f64(x) @ f64(first[0]) + f64(first[1]) for x in batches]
    scale, bias = norm
    after = [hidden(batch_norm(x, scale, bias, eps)) for x in before]
    last = [x @ f64(second[0]) + f64(second[1]) for x in after]
    return population(before), population(last)


def assert_statistics(got, expected) -> None:
    """Compares (mean, variance) with the float64 ones."""
    for found, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(f64(found), wanted, rtol=TOLERANCE, atol=TOLERANCE)
