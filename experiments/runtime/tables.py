"""Numbers in tables."""

import math
import statistics
from collections.abc import Sequence


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """Format the mean ± sample standard deviation; one value has only a mean."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):  # a seed that diverged
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"
