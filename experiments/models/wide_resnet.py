"""Wide residual networks for CIFAR.

Zagoruyko and Komodakis, arXiv:1605.07146, as the original SWA repository has them
(github.com/timgaripov/swa, models/wide_resnet.py): convolutions have biases, and a
block strides in its second one.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.common import (
    NO_DATA,
    AxisName,
    Data,
    Dtype,
    batch_norm,
    normalise,
    torch_uniform,
)

# Glorot and Bengio 2010, uniform, scaled for ReLU.
_xavier_uniform = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")


class _WideBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, dropout between; plus the input."""

    width: int
    stride: int
    dropout: float
    train: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.width, (3, 3))(nn.relu(self.norm()(x)))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = self.conv(self.width, (3, 3), self.stride)(nn.relu(self.norm()(y)))
        if x.shape != y.shape:
            x = self.conv(self.width, (1, 1), self.stride, name="projection")(x)
        return x + y


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages of wide blocks, average pooling, a dense head.

    Attributes:
        depth: Number of convolutions in sequence and the head: 6 n + 4, such as 28.
        widen: Factor on the stages' 16, 32 and 64 channels.
        dropout: Share of activations dropped between a block's convolutions.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for.
        axis_name: Mapped axis over which BatchNorm averages its moments.
    """

    depth: int = 28
    widen: int = 10
    dropout: float = 0.0
    dtype: Dtype = "float32"
    data: Data = NO_DATA
    axis_name: AxisName = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, num_classes] of raw images [batch, 32, 32, 3].

        Args:
            images: Raw pixels, of any real dtype.
            train: Normalise by the batch's statistics and update the running
                ones (collection `batch_stats`), instead of reading those.

        Raises:
            ValueError: `depth` is not 6 n + 4.
        """
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(
                f"depth is {self.depth}; three stages of blocks need 6 n + 4, such as"
                " 10, 16 or 28."
            )
        conv = functools.partial(
            nn.Conv, dtype=self.dtype, kernel_init=_xavier_uniform, padding="SAME_LOWER"
        )
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = normalise(images, self.data, self.dtype)
        x = conv(16, (3, 3))(x)
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                width = 16 * self.widen * 2**stage
                x = _WideBlock(width, stride, self.dropout, train, conv, norm)(x)
        x = nn.relu(norm()(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.data.num_classes, kernel_init=torch_uniform)(x)
