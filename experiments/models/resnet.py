"""ResNet v1.5: residual bottlenecks that stride in their 3x3 convolution.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385,
as trained since Goyal et al., arXiv:1706.02677: the stride sits in the 3x3 convolution
instead of the first 1x1 ("v1.5"), and each block's last BatchNorm starts at scale 0, so
that every block starts as the identity.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.data.dataset import Inputs
from experiments.models.common import (
    NO_DATA,
    AxisName,
    Data,
    Dtype,
    batch_norm,
    he_normal_fan_out,
    normalise,
)

#: Bottlenecks per stage, by the depth of the network.
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: What it is made for, raw pixels left as they are.
IMAGENET = Inputs((224, 224, 3), 1000)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, added to the input.

    Attributes:
        width: Channels of the 3x3 convolution; the block returns four times as many.
        stride: Of the 3x3 convolution, and of the projection.
        conv: Makes a convolution from its channels, window and strides.
        norm: Makes a BatchNorm.
    """

    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, height / stride, width / stride, 4 * self.width]."""
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), strides)(y)))
        y = self.conv(4 * self.width, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), strides, name="projection")(x)
            x = self.norm(name="projection_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 7x7 stem, four stages of bottlenecks, global average pooling, a dense head.

    Parameters and BatchNorm statistics are float32 whatever the compute dtype; logits
    are float32, so that the loss is.

    Attributes:
        stages: Bottlenecks per stage, see `STAGES`.
        dtype: What it computes in; parameters and averages stay float32.
        norm_momentum: Of BatchNorm's running statistics.
        data: What it is made for.
        axis_name: Mapped axis over which BatchNorm averages its moments.
    """

    stages: tuple[int, ...]
    dtype: Dtype = "float32"
    norm_momentum: float = 0.9
    data: Data = NO_DATA
    axis_name: AxisName = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, num_classes] of images [batch, height, width, 3].

        Args:
            images: Raw pixels, of any real dtype.
            train: Normalise by the batch's statistics and update the running
                ones (collection `batch_stats`), instead of reading those.
        """
        conv = functools.partial(
            nn.Conv,
            use_bias=False,  # BatchNorm subtracts the mean, and the bias with it.
            # Under a stride, windows then start where the published symmetric padding
            # has them; "SAME" would shift them by a pixel.
            padding="SAME_LOWER",
            dtype=self.dtype,
            kernel_init=he_normal_fan_out,
        )
        norm = batch_norm(train, self.dtype, self.axis_name, self.norm_momentum)
        x = normalise(images, self.data, self.dtype)
        x = conv(64, (7, 7), (2, 2), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, stride, conv, norm)(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(
            self.data.num_classes, kernel_init=nn.initializers.normal(0.01)
        )(x)
