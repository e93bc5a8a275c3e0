"""A small convolutional network with BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.common import NO_DATA, AxisName, Data, Dtype, batch_norm
from experiments.runtime.checks import ALL_AT_LEAST_1, check, check_settings


class ConvNet(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, average pooling, a dense head.

    Strided convolutions shrink the image: on CPUs the gradient of a pooling
    layer costs more than the convolutions it follows.

    Attributes:
        widths: Channels of each convolution.
        strides: Stride of each convolution.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for; inputs are scaled to [-0.5, 0.5].
        axis_name: Mapped axis over which BatchNorm averages its moments, under
            `jax.pmap` or `jax.shard_map`. None: those of the rows at hand.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Dtype = "float32"
    data: Data = NO_DATA
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        check_settings(self, ALL_AT_LEAST_1, "widths", "strides")
        check(
            len(self.widths) == len(self.strides) > 0,
            f"widths is {self.widths} and strides is {self.strides}; give one of"
            " each for every convolution, and at least one.",
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, num_classes] of raw images [batch, height, width, 1].

        Args:
            images: Raw pixels, of any real dtype.
            train: Normalise by the batch's statistics and update the running
                ones (collection `batch_stats`), instead of reading those.
        """
        x = images.astype(jnp.float32) / self.data.pixel_max - 0.5
        norm = batch_norm(train, self.dtype, self.axis_name)
        for width, stride in zip(self.widths, self.strides, strict=True):
            # BatchNorm subtracts the mean, so a bias before it would do nothing.
            x = nn.Conv(
                width, (3, 3), strides=stride, use_bias=False, dtype=self.dtype
            )(x)
            x = norm()(x)
            x = nn.relu(x)
        return nn.Dense(self.data.num_classes)(
            jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        )
