"""VGG16 for CIFAR, as the original SWA repository has it.

Simonyan and Zisserman, arXiv:1409.1556, configuration D, with a classifier of 512
features for images of 32x32 (github.com/timgaripov/swa, models/vgg.py).
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

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
from experiments.runtime.checks import SHARE, check_settings

#: Channels of the convolutions between two poolings.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Five stages of 3x3 convolutions and 2x2 max pooling, and three dense layers.

    Attributes:
        batch_norm: Whether BatchNorm follows each convolution.
        dropout: Share of the classifier's activations dropped in training, which needs
            `rngs={"dropout": key}`.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for.
        axis_name: Mapped axis over which BatchNorm averages its moments.
    """

    batch_norm: Annotated[bool, tyro.conf.Suppress]
    dropout: float = 0.5
    dtype: Dtype = "float32"
    data: Data = NO_DATA
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        """Reject shares that are none."""
        check_settings(self, SHARE, "dropout")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, num_classes] of raw images [batch, 32, 32, 3].

        Args:
            images: Raw pixels, of any real dtype.
            train: Drop activations, normalise by the batch's statistics and update the
                running ones (collection `batch_stats`), instead of reading those.
        """
        x = normalise(images, self.data, self.dtype)
        norm = batch_norm(train, self.dtype, self.axis_name)
        for widths in STAGES:
            for width in widths:
                x = nn.Conv(
                    width, (3, 3), dtype=self.dtype, kernel_init=he_normal_fan_out
                )(x)
                if self.batch_norm:
                    x = norm()(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(512, dtype=self.dtype, kernel_init=torch_uniform)(x)
            x = nn.relu(x)
        return nn.Dense(self.data.num_classes, kernel_init=torch_uniform)(
            x.astype(jnp.float32)
        )
