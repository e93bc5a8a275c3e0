"""(f): import time."""

import subprocess
import sys
from collections.abc import Iterator

from experiments.benchmark.measuring import Line, Options, in_milliseconds


def import_time(options: Options) -> Iterator[Line]:
    """(f) `import swa_jax` where jax and optax are imported anyway."""
    # What importing jax left to collect takes 40 ms, and is not ours to pay.
    code = "import gc, time, jax, optax; gc.collect(); t = time.perf_counter(); {}"
    code += "; print(time.perf_counter() - t)"

    def seconds(statement: str) -> float:
        command = [sys.executable, "-c", code.format(statement)]
        return float(subprocess.check_output(command))

    extra = [seconds("import swa_jax") for _ in range(options.rounds)]
    what = "import swa_jax after jax and optax"
    yield in_milliseconds("f", what, extra, "under 50 ms")
