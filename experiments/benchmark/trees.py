"""What the averages alone are measured on."""

import functools

import jax
import jax.numpy as jnp

from experiments.benchmark.measuring import PyTree
from experiments.models.resnet import IMAGENET, STAGES, ResNet


@functools.cache
def resnet50_params() -> PyTree:
    """ResNet-50's parameters: 161 leaves, 25,557,032 float32 values."""
    model = ResNet(STAGES[50], data=IMAGENET)
    init = jax.jit(functools.partial(model.init, train=False))
    return init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
