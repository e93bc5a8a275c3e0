"""The networks of the published experiments: sizes, dtypes, modes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import swa_jax
from experiments import models
from experiments.config.named import EXPERIMENTS
from experiments.config.schema import override
from experiments.data.dataset import Inputs
from experiments.models.convnet import ConvNet
from experiments.models.from_nnx import NnxConvNet
from experiments.models.preresnet import PreResNet
from experiments.models.resnet import ResNet
from experiments.models.transformer import Transformer
from experiments.models.vgg import VGG16
from experiments.models.wide_resnet import WideResNet
from experiments.training.scoring import make_batch_stats_fn
from tests.helpers import run_job

SHAPE = 32, 32, 3
IMAGES = Inputs(SHAPE, 10)
GREY = Inputs(SHAPE, 10, (120.0,), (60.0,))
CIFAR = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
KEY = jax.random.key(0)


def shapes(model, inputs=CIFAR):
    """Of all variables; nothing is computed."""
    return jax.eval_shape(lambda k, x: model.init(k, x, train=False), KEY, inputs)


def count(model, inputs=CIFAR):
    params = shapes(model, inputs)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("model", "exact", "millions"),
    [
        # Izmailov et al. 2018 and Zagoruyko and Komodakis 2016 publish the millions;
        # the sums are over layers, by hand: VGG16's 13 convolutions hold 14,714,688.
        (VGG16(batch_norm=False, data=Inputs((32, 32, 3), 100)), 15_291_300, 15.3),
        (VGG16(batch_norm=False, data=IMAGES), 15_245_130, 15.2),
        (VGG16(batch_norm=True, data=IMAGES), 15_253_578, 15.3),
        (PreResNet(164, data=IMAGES), 1_703_258, 1.7),
        (PreResNet(110, data=IMAGES), 1_146_842, 1.1),
        (WideResNet(28, 10, data=IMAGES), 36_489_290, 36.5),
    ],
)
def test_published_sizes(model, exact, millions):
    found = count(model)
    assert round(found / 1e6, 1) == millions
    assert found == exact


SMALL: list[Any] = [
    ConvNet((4, 4), (1, 2), data=IMAGES),
    NnxConvNet((4, 4), (1, 2), data=IMAGES),
    PreResNet(11, data=GREY),
    WideResNet(10, 1, data=Inputs(SHAPE, 10, (120.0, 110.0, 100.0), (60.0,) * 3)),
    VGG16(batch_norm=True, data=GREY),
    ResNet((1, 1, 1, 1), data=IMAGES),
]
NAMES = [type(model).__name__ for model in SMALL]
# Networks without statistics, with what they take and give.
WITHOUT_NORM = VGG16(batch_norm=False, data=IMAGES)
TEXT = Transformer(layers=2, heads=2, width=8, data=Inputs((6,), 10))
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.uint8)


@pytest.mark.parametrize(
    ("model", "inputs", "logits_shape"),
    [
        *((model, CIFAR, (2, 10)) for model in (*SMALL, WITHOUT_NORM)),
        (TEXT, TOKENS, (2, 6, 10)),
    ],
    ids=[*NAMES, "plain VGG16", "Transformer"],
)
def test_parameters_statistics_and_logits_are_float32_under_bfloat16(
    model, inputs, logits_shape
):
    model = model.clone(dtype="bfloat16")
    variables = shapes(model, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def both(variables, images, key):
        evaluated = model.apply(variables, images, train=False)
        return evaluated, model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )

    evaluated, (trained, updated) = jax.eval_shape(both, variables, inputs, KEY)
    for logits in (evaluated, trained):
        assert (logits.shape, logits.dtype) == (logits_shape, jnp.float32)
    # The state has one structure and one dtype, step after step.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updated.get("batch_stats")) == (
        jax.tree.map(lambda x: (x.shape, x.dtype), variables.get("batch_stats"))
    )
    text = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(
        variables, jnp.zeros(inputs.shape, inputs.dtype)
    ))  # fmt: skip
    assert "bf16" in text


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL[1:4], ids=NAMES[1:4])
def test_training_mode_normalises_by_the_batch(model):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, images)

    @jax.jit
    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = train(variables, images)
    # Statistics move by a tenth of the way to the batch's: fed twice, the distance to
    # what one batch has shrinks to 0.81.
    _, again = train({**variables, **updated}, images)
    old, new, newer = (
        jax.tree.leaves(x["batch_stats"]) for x in (variables, updated, again)
    )
    for a, b, c in zip(old, new, newer, strict=True):
        np.testing.assert_allclose(c - b, 0.9 * (b - a), rtol=1e-3, atol=1e-4)
    assert np.any(np.abs(np.asarray(new[0]) - np.asarray(old[0])) > 1e-3)
    # Training's logits ignore the running statistics, evaluation's do not.
    moved = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
    np.testing.assert_array_equal(
        train({**variables, "batch_stats": moved}, images)[0], logits
    )
    evaluate = jax.jit(lambda v, x: model.apply(v, x, train=False))
    assert np.any(
        np.asarray(evaluate({**variables, "batch_stats": moved}, images))
        != np.asarray(evaluate(variables, images))
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL[1:4], ids=NAMES[1:4])
def test_batch_norm_pass_fits_every_network(model):
    """Of one batch, recomputed statistics are the ones training mode uses."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, images)
    found = swa_jax.recompute_batch_stats(
        make_batch_stats_fn(model),
        variables["params"],
        variables["batch_stats"],
        [images],
    )
    trained, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    evaluated = model.apply({**variables, "batch_stats": found}, images, train=False)
    np.testing.assert_allclose(evaluated, trained, rtol=1e-3, atol=1e-4)


def test_nnx_network_is_the_linen_one():
    """The same parameters give the same logits and statistics."""
    linen, nnx = SMALL[:2]
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    variables = nnx.init(KEY, images, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    renamed = {
        "params": {
            "Dense_0": params["head"],
            **{f"Conv_{i}": params["convolutions"][i] for i in range(2)},
            **{f"BatchNorm_{i}": params["norms"][i] for i in range(2)},
        },
        "batch_stats": {f"BatchNorm_{i}": stats["norms"][i] for i in range(2)},
    }
    apply = {"train": True, "mutable": ["batch_stats"]}
    found, updated = nnx.apply(variables, images, **apply)
    expected, expected_updated = linen.apply(renamed, images, **apply)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for i in range(2):
        for kind in ("mean", "var"):
            np.testing.assert_allclose(
                updated["batch_stats"]["norms"][i][kind],
                expected_updated["batch_stats"][f"BatchNorm_{i}"][kind],
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.slow
def test_vgg_drops_activations_in_training_only():
    model = WITHOUT_NORM
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, images)

    @jax.jit
    def logits(key):
        return model.apply(variables, images, train=True, rngs={"dropout": key})

    first, again, other = (logits(jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))
    assert "batch_stats" not in variables


@pytest.fixture(scope="module")
def transformer():
    model = TEXT.clone(dropout=0.5, data=Inputs((6,), 11))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 6), np.uint8)
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, tokens)
    # Away from the start, where residual layers hardly matter.
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), variables
    )
    return model, variables, tokens


@pytest.mark.slow
def test_transformer_sees_no_later_token(transformer):
    model, variables, tokens = transformer
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    logits = np.asarray(apply(tokens))
    assert (logits.shape, logits.dtype) == ((3, 6, 11), np.dtype(np.float32))
    for position in range(6):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 1) % 11
        moved = np.abs(np.asarray(apply(changed)) - logits).max(axis=(0, 2))
        assert np.all(moved[:position] < 1e-5)
        assert np.all(moved[position:] > 1e-4)


@pytest.mark.slow
def test_transformer_knows_positions_and_shorter_rows(transformer):
    model, variables, tokens = transformer
    logits = model.apply(variables, tokens, train=False)
    short = model.apply(variables, tokens[:, :4], train=False)
    np.testing.assert_allclose(short, logits[:, :4], rtol=1e-4, atol=1e-5)
    same = model.apply(variables, np.zeros((1, 6), np.uint8), train=False)
    assert np.abs(np.asarray(same[0, 0] - same[0, 5])).max() > 1e-4
    with pytest.raises(ValueError, match=r"tokens has rows of 7; .* context is 6"):
        model.apply(variables, np.zeros((1, 7), np.uint8), train=False)


def test_transformer_has_no_statistics_but_dropout(transformer):
    model, variables, tokens = transformer
    assert set(variables) == {"params"}
    one, other = (
        model.apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(n)})
        for n in range(2)
    )
    assert np.any(np.asarray(one) != np.asarray(other))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PreResNet(100, data=IMAGES), r"depth is 100; .* 9 n \+ 2, such as"),
        (WideResNet(29, data=IMAGES), r"depth is 29; .* 6 n \+ 4, such as"),
    ],
)
def test_impossible_depths_are_errors(model, message):
    with pytest.raises(ValueError, match=message):
        shapes(model)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_network(name):
    """Without its data set, which need not be here."""
    config = EXPERIMENTS[name].config
    model = config.network
    assert hash(model) == hash(config.network)  # static under jit
    inputs = jax.ShapeDtypeStruct((2, *config.data.inputs.shape), jnp.uint8)
    variables = models.shapes(model)
    logits = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variables, inputs
    )
    assert logits.shape[-1] == config.data.inputs.num_classes
    without = name.endswith(("shakespeare", "vgg16"))
    assert models.has_batch_norm(model) == (not without)


@pytest.mark.slow
def test_nnx_network_trains_to_the_end(tiny):
    """As a whole job, its BatchNorm pass included."""
    nnx = EXPERIMENTS["digits_nnx"].config
    small = nnx.model.clone(widths=(4, 4), strides=(2, 2))
    config = dataclasses.replace(tiny, name=nnx.name, model=small)
    rows = run_job(override(config, seeds=1, epochs=3, swa_epochs=(2,)))
    assert [row["label"] for row in rows] == [
        "SGD",
        "SWA, last 2 epochs",
        "SWA, last 2 epochs, statistics averaged along",
        "SWA, last 2 epochs, no BatchNorm pass",
    ]
    for row in rows:
        assert np.isfinite([*row["loss"], *row["train_loss"]]).all()
    # The pass matters: the same weights do better with statistics of their own.
    assert rows[1]["train_loss"][0] < rows[3]["train_loss"][0]
