"""ResNet v1.5: the published sizes, and where its strides and dtypes are."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments.data.dataset import Inputs
from experiments.models.resnet import IMAGENET, STAGES, ResNet

from ..aot.cases import RESNET50

IMAGES = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.bfloat16)


def variables(model):
    """Shapes of parameters and statistics."""
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), IMAGES)


# torchvision's counts for the same networks, which round to the published 25.6M, 44.5M
# and 60.2M.
@pytest.mark.parametrize(
    ("depth", "count"),
    [
        (50, 25_557_032),
        (101, 44_549_160),
        (152, 60_192_808),
    ],
)
def test_parameter_count(depth, count):
    params = variables(ResNet(STAGES[depth], data=IMAGENET))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


def test_resnet50_has_the_shapes_of_its_architecture():
    params = variables(ResNet(STAGES[50], data=IMAGENET))["params"]
    assert sorted(x.shape for x in jax.tree.leaves(params)) == sorted(RESNET50)


def test_float32_is_kept_where_precision_counts():
    model = ResNet(STAGES[50], dtype="bfloat16", data=IMAGENET)
    found = variables(model)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False),
        found,
        IMAGES,
    )
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)


def test_strides_are_in_the_3x3_convolutions():
    model = ResNet(STAGES[50], data=IMAGENET)
    jaxpr: Any = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        variables(model), IMAGES
    )
    strided = [
        eqn.invars[1].aval.shape[:2]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "conv_general_dilated"
        and eqn.params["window_strides"] == (2, 2)
    ]
    # The stem, then in each of three stages one block's 3x3 and its projection.
    assert strided == [(7, 7), *[(3, 3), (1, 1)] * 3]


@pytest.mark.slow
def test_blocks_start_as_the_identity_on_zero_scales():
    # The last norm of a block starts at 0, so that what is left is relu(x).
    model = ResNet((1, 0, 0, 0), data=Inputs((8, 8, 3), 2))
    images = jnp.zeros((1, 8, 8, 3))
    params = model.init(jax.random.key(0), images, train=False)["params"]
    scales = {
        name: jnp.unique(leaf["scale"]).tolist()
        for name, leaf in params["Bottleneck_0"].items()
        if "scale" in leaf
    }
    assert scales == {
        "BatchNorm_0": [1.0],
        "BatchNorm_1": [1.0],
        "BatchNorm_2": [0.0],
        "projection_norm": [1.0],
    }
