"""The pass over models of Flax, linen and nnx, against NumPy's float64."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import chex
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swa_jax
from swa_jax.frameworks import flax as frameworks

from .populations import (
    BATCHES,
    assert_statistics,
    batch_norm,
    f64,
    population,
    two_layers,
)

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

EPS = 1e-5  # Flax's default


def bits(tree) -> list[bytes]:
    return [
        np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes()
        for x in jax.tree.leaves(tree)
    ]


def is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def perturbed(tree, seed=5):
    """Weights other than the initial ones, as averages are."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            x + 0.3 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def test_no_framework_comes_with_the_library():
    code = (
        "import sys, swa_jax, swa_jax.frameworks; "
        "bad = {'flax', 'equinox', 'haiku', 'keras'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Linen.


class Net(nn.Module):
    """Linear, norm, tanh, linear, norm, and a head, remat around it if asked."""

    remat: bool = False
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        norm = nn.remat(nn.BatchNorm) if self.remat else nn.BatchNorm
        x = norm(use_running_average=not train, name="norm_0")(
            dense(4, name="first")(x)
        )
        x = nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(x))
        x = norm(use_running_average=not train, name="norm_1", momentum=0.9)(
            dense(2, name="second")(x)
        )
        return nn.Dense(2, name="head")(x)


def expected_of(params, **options):
    first, norm, second = (params[name] for name in ("first", "norm_0", "second"))
    return two_layers(
        (first["kernel"], first["bias"]),
        (norm["scale"], norm["bias"]),
        (second["kernel"], second["bias"]),
        EPS,
        **options,
    )


def assert_net(stats, params, **options):
    for i, wanted in enumerate(expected_of(params, **options)):
        found = stats[f"norm_{i}"]
        assert_statistics((found["mean"], found["var"]), wanted)


def make(module, *arguments, **options):
    """Perturbed parameters, and statistics."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    made = module.init(keys, BATCHES[0], *arguments, **options)
    return perturbed(made["params"]), made["batch_stats"]


@pytest.mark.parametrize(
    ("remat", "inputs"),
    [(False, None), (True, "image"), (False, lambda batch: batch["image"])],
)
def test_linen(remat, inputs):
    net = Net(remat)
    params, stats = make(net, True)
    batches: Iterable[Any] = BATCHES
    if inputs is not None:
        batches = [{"image": x, "n": 3} for x in BATCHES]
    fn = frameworks.batch_stats_fn(net, inputs=inputs, train=True)
    assert_net(swa_jax.recompute_batch_stats(fn, params, stats, batches), params)


@pytest.mark.slow
def test_linen_dropout():
    """With rate 0.5, keys are needed; those of a batch are its own."""
    net = Net(rate=0.5)
    params, stats = make(net, True)
    fn = frameworks.batch_stats_fn(
        net,
        inputs="x",
        rngs=lambda batch: {"dropout": batch["key"]},
        train=True,
    )
    keys = list(jax.random.split(jax.random.key(3), len(BATCHES)))
    batches = [{"x": x, "key": k} for x, k in zip(BATCHES, keys, strict=True)]
    recomputed = swa_jax.recompute_batch_stats(fn, params, stats, batches)
    # What the norm behind the dropout sees, from Flax's own masks.
    _, seen = zip(
        *[
            net.apply(
                {"params": params, "batch_stats": stats},
                x,
                True,
                rngs={"dropout": k},
                mutable=["intermediates", "batch_stats"],
                capture_intermediates=lambda module, _: module.name == "second",
            )
            for x, k in zip(BATCHES, keys, strict=True)
        ],
        strict=True,
    )
    rows = [f64(s["intermediates"]["second"]["__call__"][0]) for s in seen]
    norm = recomputed["norm_1"]
    assert_statistics((norm["mean"], norm["var"]), population(rows))
    norm = recomputed["norm_0"]
    assert_statistics((norm["mean"], norm["var"]), expected_of(params)[0])
    # One key for all batches will do as well; it needs one.
    fixed = frameworks.batch_stats_fn(
        net, rngs={"dropout": jax.random.key(3)}, train=True
    )
    again = swa_jax.recompute_batch_stats(fixed, params, stats, BATCHES)
    chex.assert_tree_all_finite(again)
    chex.assert_trees_all_close(again["norm_0"], recomputed["norm_0"])
    fn = frameworks.batch_stats_fn(net, train=True)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        swa_jax.recompute_batch_stats(fn, params, stats, BATCHES)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_linen_spectral_norm():
    net = Spectral()
    params, stats = make(net, True)
    fn = frameworks.batch_stats_fn(net, train=True)
    with pytest.raises(ValueError, match=r"SpectralNorm_0.*keep="):
        swa_jax.recompute_batch_stats(fn, params, stats, BATCHES)
    recomputed = swa_jax.recompute_batch_stats(
        fn, params, stats, BATCHES, keep=frameworks.is_spectral_norm
    )
    assert bits(recomputed["SpectralNorm_0"]) == bits(stats["SpectralNorm_0"])
    # One step of the power iteration from what was kept, in training and evaluation.
    kernel = f64(params["Dense_0"]["kernel"])
    u = f64(stats["SpectralNorm_0"]["Dense_0/kernel/u"])
    v = u @ kernel.T
    v /= np.linalg.norm(v)
    u = v @ kernel
    sigma = (v @ kernel @ (u / np.linalg.norm(u)).T).item()
    rows = [f64(x) @ kernel / sigma + f64(params["Dense_0"]["bias"]) for x in BATCHES]
    norm = recomputed["BatchNorm_0"]
    assert_statistics((norm["mean"], norm["var"]), population(rows))
    # So the network that is evaluated has unit variance on one batch of everything.
    variables = {"params": params, "batch_stats": recomputed}
    out = f64(net.apply(variables, np.concatenate(BATCHES), False))
    scale, bias = (f64(params["BatchNorm_0"][k]) for k in ("scale", "bias"))
    np.testing.assert_allclose(out.mean(0), bias, atol=1e-5)
    np.testing.assert_allclose(out.std(0), np.abs(scale), rtol=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return jnp.tanh(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        scan = nn.scan(
            nn.remat(Block, static_argnums=2),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
            in_axes=nn.broadcast,
        )
        return scan(name="blocks")(x, train)[0]


def scanned_populations(kernels, biases, scales, shifts):
    rows = [f64(x) for x in BATCHES]
    for kernel, bias, scale, shift in zip(kernels, biases, scales, shifts, strict=True):
        rows = [x @ f64(kernel) + f64(bias) for x in rows]
        yield population(rows)
        rows = [np.tanh(batch_norm(x, scale, shift, EPS)) for x in rows]


def test_linen_scan_over_remat():
    net = Scanned()
    params, stats = make(net, True)
    fn = frameworks.batch_stats_fn(net, train=True)
    recomputed = swa_jax.recompute_batch_stats(fn, params, stats, BATCHES)
    dense, norm = (params["blocks"][k] for k in ("Dense_0", "BatchNorm_0"))
    expected = scanned_populations(
        dense["kernel"], dense["bias"], norm["scale"], norm["bias"]
    )
    found = recomputed["blocks"]["BatchNorm_0"]
    for mean, var, wanted in zip(found["mean"], found["var"], expected, strict=True):
        assert_statistics((mean, var), wanted)


def test_linen_shared_layers_and_other_collections():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            shift = self.variable("constants", "shift", jnp.ones, 3).value
            dense = nn.Dense(3, name="dense")
            x = nn.BatchNorm(use_running_average=not train)(dense(x) + shift[None])
            return nn.BatchNorm(use_running_average=not train)(dense(jnp.tanh(x)))

    net = Shared()
    params, stats = make(net, True)
    shift = {"shift": jnp.array([1.0, 2.0, 3.0])}
    fn = frameworks.batch_stats_fn(net, variables={"constants": shift}, train=True)
    recomputed = swa_jax.recompute_batch_stats(fn, params, stats, BATCHES)
    dense, norm = params["dense"], params["BatchNorm_0"]
    first = (dense["kernel"], f64(dense["bias"]) + f64(shift["shift"]))
    expected = two_layers(
        first,
        (norm["scale"], norm["bias"]),
        (dense["kernel"], dense["bias"]),
        EPS,
    )
    for i, wanted in enumerate(expected):
        found = recomputed[f"BatchNorm_{i}"]
        assert_statistics((found["mean"], found["var"]), wanted)


def test_linen_misuse():
    net = Net()
    with pytest.raises(TypeError, match=r"linen\.Module, got type; pass the module"):
        frameworks.batch_stats_fn(Net)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got BatchNorm; for an nnx model use .*recom"):
        frameworks.batch_stats_fn(
            nnx.BatchNorm(2, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"mutable=True must not.*variables="):
        frameworks.batch_stats_fn(net, mutable=True)
    with pytest.raises(TypeError, match=r"inputs must be a key.*got 1\.5"):
        frameworks.batch_stats_fn(net, inputs=1.5)  # type: ignore[arg-type]
    params, stats = make(net, True)
    fn = frameworks.batch_stats_fn(net, inputs="image", train=True)
    with pytest.raises(ValueError, match=r"inputs='image'.*the keys \['x'\]; name"):
        swa_jax.recompute_batch_stats(fn, params, stats, [{"x": BATCHES[0]}])
    fn = frameworks.batch_stats_fn(net, train=False)
    with pytest.raises(ValueError, match=r"unchanged.*train=True"):
        swa_jax.recompute_batch_stats(fn, params, stats, BATCHES)


# NNX.


class NNXNet(nnx.Module):
    """The same network, with Dropout and anything else that a model may hold."""

    def __init__(self, rngs, rate=0.0, remat=False):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(2, 2, rngs=rngs)
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))
        self.remat = remat

    def body(self, x):
        return self.norm_0(self.first(x))

    def __call__(self, x):
        self.steps[...] += 1
        x = nnx.remat(NNXNet.body)(self, x) if self.remat else self.body(x)
        x = self.norm_1(self.second(self.dropout(jnp.tanh(x))))
        return self.head(x)


def perturb(model):
    nnx.update(model, perturbed(nnx.state(model, nnx.Param)))
    return model


def modes(model):
    names = ("use_running_average", "deterministic")
    return [
        (path, [getattr(node, name, None) for name in names])
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    ]


def others(model):
    """All but the batch statistics."""
    return nnx.state(model, nnx.Not(nnx.BatchStat))


def assert_nnx_net(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_net(stats, params)


@pytest.mark.parametrize(("remat", "mode"), [(False, "eval"), (True, "train")])
def test_nnx(remat, mode):
    model = perturb(NNXNet(nnx.Rngs(0), remat=remat))
    getattr(model, mode)()
    before, before_modes = bits(others(model)), modes(model)
    recompute: Callable[..., object] = frameworks.recompute_batch_stats
    assert recompute(model, [(x, 0) for x in BATCHES], inputs=0) is None
    assert_nnx_net(model)
    assert bits(others(model)) == before
    assert modes(model) == before_modes
    # Training goes on.
    nnx.jit(lambda model, x: model(x))(model, BATCHES[0])


def test_nnx_dropout_draws_otherwise_in_every_batch():
    model = perturb(NNXNet(nnx.Rngs(0), rate=0.5))
    before = bits(others(model))
    one = [BATCHES[0]]
    frameworks.recompute_batch_stats(model, one)
    first = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    frameworks.recompute_batch_stats(model, one)
    # It is a function of the model, ...
    assert bits(first) == bits(nnx.state(model, nnx.BatchStat))
    frameworks.recompute_batch_stats(model, one * 2)
    second = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    # ... and one batch given twice is two draws behind the dropout, one before it.
    chex.assert_trees_all_close(first["norm_0"], second["norm_0"], rtol=1e-5)
    assert np.abs(first["norm_1"]["mean"] - second["norm_1"]["mean"]).max() > 1e-3
    assert bits(others(model)) == before
    copy = nnx.clone(model)
    copy.train()
    rows = []
    for _ in range(2):
        hidden = copy.dropout(jnp.tanh(copy.norm_0(copy.first(one[0]))))
        rows.append(f64(copy.second(hidden)))
    assert_statistics((model.norm_1.mean[...], model.norm_1.var[...]), population(rows))


def test_nnx_forward():
    """What a training step does with a batch, Dropout off."""

    def forward(model, batch):
        model.set_attributes(deterministic=True, raise_if_not_found=False)
        return model(batch["image"])

    model = perturb(NNXNet(nnx.Rngs(0), rate=0.5))
    batches = [{"image": x} for x in BATCHES]
    frameworks.recompute_batch_stats(model, batches, forward=forward)
    assert_nnx_net(model)


@pytest.mark.skipif(not hasattr(nnx, "SpectralNorm"), reason="not in Flax 0.12.0")
def test_nnx_spectral_norm():
    class Spectral(nnx.Module):
        def __init__(self, rngs):
            self.spectral = nnx.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.spectral(x))

    model = perturb(Spectral(nnx.Rngs(0)))
    params = bits(nnx.state(model, nnx.Param))
    kept = bits(model.spectral.batch_stats)
    kernel = f64(model.spectral.layer_instance.kernel[...])
    bias = f64(model.spectral.layer_instance.bias[...])
    u = f64(model.spectral.batch_stats["kernel", "u"][...])
    frameworks.recompute_batch_stats(model, BATCHES)
    # This layer overwrites its own weights; not the user's, here.
    assert bits(nnx.state(model, nnx.Param)) == params
    assert bits(model.spectral.batch_stats) == kept
    v = u @ kernel.T
    v /= np.linalg.norm(v)
    u = v @ kernel
    sigma = (v @ kernel @ (u / np.linalg.norm(u)).T).item()
    rows = [f64(x) @ kernel / sigma + bias for x in BATCHES]
    norm = model.norm
    assert_statistics((norm.mean[...], norm.var[...]), population(rows))


def test_nnx_scan_over_layers():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.norm(self.linear(x)))

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Block, in_axes=0, out_axes=0)
            self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

        def __call__(self, x):
            return nnx.scan(
                lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, self.blocks)

    model = perturb(Scanned(nnx.Rngs(0)))
    frameworks.recompute_batch_stats(model, BATCHES)
    linear, norm = model.blocks.linear, model.blocks.norm
    weights = [linear.kernel, linear.bias, norm.scale, norm.bias]
    expected = scanned_populations(*(x[...] for x in weights))
    for mean, var, wanted in zip(norm.mean[...], norm.var[...], expected, strict=True):
        assert_statistics((mean, var), wanted)


def test_nnx_shared_layers():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = self.second = nnx.Linear(3, 3, rngs=rngs)
            self.norm_0 = nnx.BatchNorm(3, rngs=rngs)
            self.norm_1 = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.norm_0(self.first(x)))
            return self.norm_1(self.second(x))

    model = perturb(Shared(nnx.Rngs(0)))
    frameworks.recompute_batch_stats(model, BATCHES)
    assert model.first is model.second
    linear = model.first.kernel[...], model.first.bias[...]
    norms = model.norm_0, model.norm_1
    scale = norms[0].scale[...], norms[0].bias[...]
    expected = two_layers(linear, scale, linear, EPS)
    for norm, wanted in zip(norms, expected, strict=True):
        assert_statistics((norm.mean[...], norm.var[...]), wanted)


def test_nnx_keep_and_mode():
    model = perturb(NNXNet(nnx.Rngs(0)))
    before = bits(nnx.state(model.norm_1, nnx.BatchStat))
    frameworks.recompute_batch_stats(
        model, BATCHES, keep="norm_1", mode="sample_weighted"
    )
    assert bits(nnx.state(model.norm_1, nnx.BatchStat)) == before
    kernel, bias = f64(model.first.kernel[...]), f64(model.first.bias[...])
    variances = [(f64(x) @ kernel + bias).var(0) for x in BATCHES]
    wanted = np.average(variances, axis=0, weights=[len(x) for x in BATCHES])
    np.testing.assert_allclose(f64(model.norm_0.var[...]), wanted, rtol=1e-5)


def test_nnx_misuse_changes_nothing():
    model = perturb(NNXNet(nnx.Rngs(0)))
    before = bits(nnx.state(model))
    with pytest.raises(ValueError, match="batches is empty"):
        frameworks.recompute_batch_stats(model, [])
    bad = [*BATCHES, BATCHES[0] * np.nan]
    with pytest.raises(swa_jax.NonFiniteError, match=r"norm_0.*batch 4"):
        frameworks.recompute_batch_stats(model, bad)
    with pytest.raises(ValueError, match="inputs='x' has no meaning with forward"):
        frameworks.recompute_batch_stats(
            model, BATCHES, inputs="x", forward=lambda model, x: model(x)
        )
    with pytest.raises(TypeError, match=r"forward must be a function.*got str"):
        frameworks.recompute_batch_stats(
            model,
            BATCHES,
            forward="encode",  # type: ignore[arg-type]
        )
    with pytest.raises(TypeError, match=r"nnx\.Module, got Net; for linen.*_fn"):
        frameworks.recompute_batch_stats(Net(), BATCHES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nnx\.Module, got State; pass the model"):
        frameworks.recompute_batch_stats(
            nnx.state(model),  # type: ignore[arg-type]
            BATCHES,
        )
    with pytest.raises(ValueError, match=r"a Linear, has no nnx\.BatchStat"):
        frameworks.recompute_batch_stats(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), BATCHES)
    assert bits(nnx.state(model)) == before
