"""What the networks for images share."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from experiments.data.dataset import Inputs

# What a network computes in; parameters and averages stay float32.
Dtype = Literal["float32", "bfloat16"]
# Filled in by `build`, not by a user.
Data = Annotated[Inputs, tyro.conf.Suppress]
AxisName = Annotated[str | None, tyro.conf.Suppress]
NO_DATA = Inputs((), 0)

# He et al., arXiv:1502.01852, by the outputs of a convolution.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# What torch.nn.Linear starts from: uniform up to 1 / sqrt(inputs).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def normalise(images: jax.Array, data: Inputs, dtype: Any) -> jax.Array:
    """Raw pixels in units of the data's deviation from its mean.

    Args:
        images: [batch, height, width, channels], of any real dtype.
        data: Tells mean and deviation of each channel, or one for all.
        dtype: Of the result; the arithmetic is float32.
    """
    channels = 1, 1, 1, -1
    x = images.astype(jnp.float32) - jnp.array(data.pixel_mean).reshape(channels)
    return (x / jnp.array(data.pixel_std).reshape(channels)).astype(dtype)


def batch_norm(
    train: bool, dtype: Any, axis_name: str | None, momentum: float = 0.9
) -> Callable[..., nn.BatchNorm]:
    """Make BatchNorm layers; each takes what else `flax.linen.BatchNorm` takes.

    Args:
        train: Normalise by the batch and update the running statistics.
        dtype: Dtype to compute in; the statistics are float32.
        axis_name: Mapped axis over which to average the moments.
        momentum: Share of the old running statistics that stays.
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        dtype=dtype,
        axis_name=axis_name,
    )
