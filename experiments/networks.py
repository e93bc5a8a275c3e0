"""The network that an experiment's settings ask for."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments import data, models
from experiments.settings import Config


def make_model(
    config: Config, split: data.Split, axis_name: str | None = None
) -> nn.Module:
    """Build the experiment's network; nothing is initialised.

    Args:
        config: Names the network and its sizes.
        split: Tells the classes, and the pixels' mean and standard deviation.
        axis_name: Mapped axis over which BatchNorm synchronises its moments.
    """
    classes = split.num_classes
    dtype = jnp.dtype(config.dtype)
    common: dict[str, Any] = {
        "num_classes": classes,
        "dtype": dtype,
        "axis_name": axis_name,
    }
    pixels: dict[str, Any] = {
        "pixel_mean": split.pixel_mean,
        "pixel_std": split.pixel_std,
    }
    sizes: Any = config  # its checks see to it that what a network needs is there
    match config.model:
        case "convnet" | "nnx_convnet":
            kind: Any = (
                models.ConvNet if config.model == "convnet" else models.NnxConvNet
            )
            return kind(sizes.widths, sizes.strides, sizes.pixel_max, **common)
        case "vgg16" | "vgg16_bn":
            return models.VGG16(
                batch_norm=config.model == "vgg16_bn",
                dropout=sizes.dropout,
                **common,
                **pixels,
            )
        case "preresnet110" | "preresnet164":
            depth = int(config.model.removeprefix("preresnet"))
            return models.PreResNet(depth=depth, **common, **pixels)
        case "wide_resnet28_10":
            return models.WideResNet(depth=28, widen=10, **common, **pixels)
        case "resnet50" | "resnet152":
            stages = models.STAGES[config.model]
            return models.ResNet(stages=stages, **common, **pixels)
        case "transformer":
            return models.Transformer(
                vocab_size=classes,
                context=sizes.context,
                layers=sizes.layers,
                heads=sizes.heads,
                width=sizes.width,
                dropout=sizes.dropout,
                dtype=dtype,
            )
