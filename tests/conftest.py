"""One environment for all tests: CPU only, eight devices, and JAX at its strictest.

With SWA_JAX_TEST_PLATFORM=cuda or tpu they run on the accelerators that are there.
"""

import collections
import os
import zlib

# Before anything imports jax: these are read once, when the backend starts.
os.environ["JAX_PLATFORMS"] = os.environ.get("SWA_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["KERAS_BACKEND"] = "jax"

import hypothesis
import jax
import jax.experimental
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Accelerators multiply float32 with fewer digits, unless they are asked not to.
jax.config.update("jax_default_matmul_precision", "highest")

# `--hypothesis-profile=release`; tests with a number of their own keep it.
hypothesis.settings.register_profile(
    "release", max_examples=10_000, deadline=None, print_blob=True
)


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves out what is slow
def pytest_collection_modifyitems(items):
    """Mark as slow all but some cases of each test that says `sample`.

    They are spread evenly over the cases, from one that the test's name decides, so
    that of a population which many tests share every member has its turn.
    """
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        (number,) = cases[0].get_closest_marker("sample").args
        first = zlib.crc32(name.encode())
        kept = {(first + n * len(cases) // number) % len(cases) for n in range(number)}
        for index, case in enumerate(cases):
            if index not in kept:
                case.add_marker("slow")


# Its name before jax 0.8 was jax.experimental.enable_x64.
_enable_x64 = (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64


@pytest.fixture
def enable_x64():
    """64-bit types for one test."""
    with _enable_x64(True):
        yield
