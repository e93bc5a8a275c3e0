"""PreResNet: residual networks with normalisation before convolution, for CIFAR.

He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, with
bottlenecks, as the original SWA repository has it (github.com/timgaripov/swa,
models/preresnet.py).
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
    he_normal_fan_out,
    normalise,
    torch_uniform,
)


class _Bottleneck(nn.Module):
    """BatchNorm, ReLU, convolution, thrice: 1x1 down, 3x3, 1x1 up; plus the input."""

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.width, (1, 1))(nn.relu(self.norm()(x)))
        y = self.conv(self.width, (3, 3), self.stride)(nn.relu(self.norm()(y)))
        y = self.conv(4 * self.width, (1, 1))(nn.relu(self.norm()(y)))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), self.stride, name="projection")(x)
        return x + y


class PreResNet(nn.Module):
    """A 3x3 convolution, three stages of bottlenecks, average pooling, a dense head.

    Attributes:
        depth: Number of convolutions in sequence and the head: 9 n + 2, such as 110 or
            164.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for.
        axis_name: Mapped axis over which BatchNorm averages its moments.
    """

    depth: int
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
            ValueError: `depth` is not 9 n + 2.
        """
        blocks, rest = divmod(self.depth - 2, 9)
        if rest or blocks < 1:
            raise ValueError(
                f"depth is {self.depth}; three stages of bottlenecks need 9 n + 2, such"
                " as 20, 110 or 164."
            )
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=he_normal_fan_out,
            padding="SAME_LOWER",
        )
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = normalise(images, self.data, self.dtype)
        x = conv(16, (3, 3))(x)
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _Bottleneck(16 * 2**stage, stride, conv, norm)(x)
        x = nn.relu(norm()(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.data.num_classes, kernel_init=torch_uniform)(x)
