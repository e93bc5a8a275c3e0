"""One environment for all tests: CPU only, eight devices, and JAX at its strictest."""

import os

# Before anything imports jax: these are read once, when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.experimental
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


# Its name before jax 0.8 was jax.experimental.enable_x64.
_enable_x64 = (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64


@pytest.fixture
def enable_x64():
    """64-bit types for one test."""
    with _enable_x64(True):
        yield
