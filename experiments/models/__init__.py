"""Networks: Flax linen modules, and one of nnx that is used alike.

All are called as `model.init(key, inputs, train=False)` and `model.apply(variables,
inputs, train=..., mutable=["batch_stats"], rngs={"dropout": key})`. Whatever dtype they
compute in, parameters, BatchNorm's statistics and logits are float32.
"""

from experiments.models.convnet import ConvNet
from experiments.models.from_nnx import NnxConvNet
from experiments.models.preresnet import PreResNet
from experiments.models.resnet import STAGES, ResNet
from experiments.models.transformer import Transformer
from experiments.models.vgg import VGG16
from experiments.models.wide_resnet import WideResNet

__all__ = [
    "STAGES",
    "VGG16",
    "ConvNet",
    "NnxConvNet",
    "PreResNet",
    "ResNet",
    "Transformer",
    "WideResNet",
]
