"""Networks: Flax linen modules, and one of nnx that is used alike.

A network is a class in a file of its own; its attributes are the settings that a user
has. All are called as `model.init(key, inputs, train=False)` and
`model.apply(variables, inputs, train=..., mutable=["batch_stats"], rngs={"dropout":
key})`. Whatever dtype they compute in, parameters, BatchNorm's statistics and logits
are float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data.dataset import Inputs

Model = Any  # a flax.linen.Module, or what looks like one


def build(model: Model, data: Inputs, axis_name: str | None = None) -> Model:
    """The network that a configuration asks for, made for some data set.

    Nothing is loaded and nothing initialised.

    Args:
        model: The settings: a network made for no data yet.
        data: Tells the shape of inputs, the classes, and what raw pixels are like.
        axis_name: Mapped axis over which BatchNorm synchronises its moments.
    """
    return model.clone(data=data, axis_name=axis_name)


@functools.cache  # a trace takes seconds for a large network
def shapes(model: Model) -> Any:
    """Shapes and dtypes of a built network's variables; nothing is computed."""
    inputs = jnp.zeros((1, *model.data.shape), jnp.uint8)
    return jax.eval_shape(
        lambda key: model.init(key, inputs, train=False), jax.random.key(0)
    )


def has_batch_norm(model: Model) -> bool:
    """Whether a built network has statistics that an average needs anew."""
    return bool(shapes(model).get("batch_stats"))
