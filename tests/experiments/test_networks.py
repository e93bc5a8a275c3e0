"""The networks of the published experiments: sizes, dtypes, modes."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import swa_jax
from experiments import configs, data, models
from experiments.builders import Examples
from experiments.compare import train_and_evaluate
from experiments.data import MemorySplit
from experiments.evaluate import make_batch_stats_fn
from experiments.networks import make_model

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
        (models.VGG16(batch_norm=False, num_classes=100), 15_291_300, 15.3),
        (models.VGG16(batch_norm=False), 15_245_130, 15.2),
        (models.VGG16(batch_norm=True), 15_253_578, 15.3),
        (models.PreResNet(164), 1_703_258, 1.7),
        (models.PreResNet(110), 1_146_842, 1.1),
        (models.WideResNet(28, 10), 36_489_290, 36.5),
    ],
)
def test_published_sizes(model, exact, millions):
    found = count(model)
    assert round(found / 1e6, 1) == millions
    assert found == exact


SMALL = [
    models.ConvNet((4, 4), (1, 2), pixel_max=255),
    models.NnxConvNet((4, 4), (1, 2), pixel_max=255),
    models.PreResNet(11, pixel_mean=(120.0,), pixel_std=(60.0,)),
    models.WideResNet(10, 1, pixel_mean=(120.0, 110.0, 100.0), pixel_std=(60.0,) * 3),
    models.VGG16(batch_norm=True, pixel_mean=(120.0,), pixel_std=(60.0,)),
    models.ResNet((1, 1, 1, 1), num_classes=10),
]
NAMES = [type(model).__name__ for model in SMALL]
# Networks without statistics, with what they take and give.
WITHOUT_NORM = models.VGG16(batch_norm=False)
TEXT = models.Transformer(vocab_size=10, context=6, layers=2, heads=2, width=8)
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
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
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


def test_vgg_drops_activations_in_training_only():
    model = models.VGG16(batch_norm=False)
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
    model = models.Transformer(
        vocab_size=11, context=6, layers=2, heads=2, width=8, dropout=0.5
    )
    tokens = np.random.default_rng(0).integers(0, 11, (3, 6), np.uint8)
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(KEY, tokens)
    # Away from the start, where residual layers hardly matter.
    variables = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
        variables,
    )
    return model, variables, tokens


def test_transformer_sees_no_later_token(transformer):
    model, variables, tokens = transformer
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    logits = np.asarray(apply(tokens))
    assert (logits.shape, logits.dtype) == ((3, 6, 11), np.float32)
    for position in range(6):
        changed = tokens.copy()
        changed[:, position] = (changed[:, position] + 1) % 11
        moved = np.abs(np.asarray(apply(changed)) - logits).max(axis=(0, 2))
        assert np.all(moved[:position] < 1e-5)
        assert np.all(moved[position:] > 1e-4)


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
        (models.PreResNet(100), r"depth is 100; .* 9 n \+ 2, such as"),
        (models.WideResNet(29), r"depth is 29; .* 6 n \+ 4, such as"),
    ],
)
def test_impossible_depths_are_errors(model, message):
    with pytest.raises(ValueError, match=message):
        shapes(model)


@pytest.mark.parametrize("name", configs.EXPERIMENTS)
def test_every_experiment_has_its_network(name):
    _, config = configs.EXPERIMENTS[name]
    size = {"digits": 8, "fashion_mnist": 28, "imagenet2012": 224}
    channels = 1 if config.dataset in ("digits", "fashion_mnist") else 3
    side = size.get(config.dataset, 32)
    shape = (config.context,) if config.context else (side, side, channels)
    split = MemorySplit(
        Examples(np.zeros((1, *shape), np.uint8), np.zeros(1, np.int32)),
        data.NUM_CLASSES[config.dataset],
        data.PIXEL_STATISTICS.get(config.dataset, ((0.0,), (1.0,))),
    )
    model = make_model(config, split)
    assert hash(model) == hash(make_model(config, split))  # static under jit
    inputs = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
    variables = shapes(model, inputs)
    logits = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=False), variables, inputs
    )
    assert logits.shape[-1] == split.num_classes


def test_nnx_network_trains_to_the_end(tiny):
    """As a whole job, its BatchNorm pass included."""
    _, nnx = configs.EXPERIMENTS["digits_nnx"]
    config = dataclasses.replace(
        tiny, name=nnx.name, model=nnx.model, seeds=1, epochs=3, swa_epochs=(2,)
    )
    rows = train_and_evaluate(config, rich.console.Console(file=io.StringIO()))
    assert [row.label for row in rows] == [
        "SGD",
        "SWA, last 2 epochs",
        "SWA, last 2 epochs, statistics averaged along",
        "SWA, last 2 epochs, no BatchNorm pass",
    ]
    for row in rows:
        assert np.isfinite([*row.loss, *row.train_loss]).all()
    # The pass matters: the same weights do better with statistics of their own.
    assert rows[1].train_loss[0] < rows[3].train_loss[0]
