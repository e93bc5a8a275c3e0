"""(d): the BatchNorm pass."""

import functools
import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import swa_jax
from experiments.benchmark.measuring import (
    Action,
    Line,
    Options,
    PyTree,
    compare,
    jax_threads,
    take_turns,
)
from experiments.models.resnet import IMAGENET, STAGES, ResNet


class Convolutions(nn.Module):
    """Three strided convolutions, each with BatchNorm and ReLU."""

    widths: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """From images to features."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=2, padding=1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x


def forward_passes(model: nn.Module, batches: list[jax.Array]) -> dict[str, Action]:
    """All batches through a network: for statistics, in training, in inference."""
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), batches[0][:1]
    )
    params, batch_stats = variables["params"], variables["batch_stats"]

    def in_training(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    def batch_stats_fn(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> PyTree:
        return in_training(params, batch_stats, batch)[1]["batch_stats"]

    training = jax.jit(in_training)

    @jax.jit
    def inference(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, batch, train=False)

    def train_all() -> None:
        stats = batch_stats
        for batch in batches:  # running statistics go from batch to batch
            logits, updated = training(params, stats, batch)
            stats = updated["batch_stats"]
        jax.block_until_ready((logits, stats))

    return {
        "pass": lambda: jax.block_until_ready(
            swa_jax.recompute_batch_stats(batch_stats_fn, params, batch_stats, batches)
        ),
        "training": train_all,
        "inference": lambda: jax.block_until_ready(
            [inference(params, batch_stats, batch) for batch in batches]
        ),
    }


def random_batches(options: Options, count: int, size: int) -> list[jax.Array]:
    """Batches of `size` images that are noise."""
    side = options.image_size
    noise = np.random.default_rng(0).normal(size=(count, size, side, side, 3))
    return list(jnp.asarray(noise, jnp.float32))


def batch_norm_pass(options: Options) -> Iterator[Line]:
    """(d) The pass against forward passes over the same batches, an image each."""
    # Many small batches: what the pass does only in the first must not count much.
    batches = random_batches(options, 40, max(1, options.batch_size // 4))
    actions = forward_passes(ResNet(STAGES[50], data=IMAGENET), batches)
    seconds = take_turns(actions, max(3, options.rounds // 3))
    images = sum(map(len, batches))
    milliseconds = 1e3 * statistics.median(seconds["pass"]) / images
    note = f"pass: {milliseconds:.2f} ms an image, {len(batches)} batches"
    for other, target in (("training", "at most 1.1"), ("inference", "")):
        pair = seconds["pass"], seconds[other]
        what = f"BatchNorm pass over {other}-mode forward pass, ResNet-50"
        yield compare("d", what, pair, target, note)
    batches = random_batches(options, 12, options.batch_size)
    actions = forward_passes(Convolutions(), batches)
    del actions["training"]
    seconds = take_turns(actions, options.rounds)
    pair = seconds["pass"], seconds["inference"]
    what = "recompute_batch_stats over inference, 3 convolutions"
    yield compare("d", what, pair, "")
    yield from _torch_update_bn(options, [np.asarray(b) for b in batches])


def _torch_update_bn(options: Options, batches: list[np.ndarray]) -> Iterator[Line]:
    """PyTorch's own ratio, on the network of `Convolutions`."""
    try:
        import torch
        from torch.optim.swa_utils import update_bn
    except ImportError:
        return
    torch.set_num_threads(jax_threads())
    layers: list[Any] = []
    for before, after in itertools.pairwise((3, *Convolutions.widths)):
        layers += [
            torch.nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(after),
            torch.nn.ReLU(),
        ]
    model = torch.nn.Sequential(*layers)
    data = [torch.from_numpy(b.transpose(0, 3, 1, 2).copy()) for b in batches]

    def inference() -> None:
        model.eval()
        with torch.no_grad():
            for batch in data:
                model(batch)

    actions: dict[str, Action] = {
        "pass": lambda: update_bn(data, model),
        "inference": inference,
    }
    seconds = take_turns(actions, options.rounds)
    pair = seconds["pass"], seconds["inference"]
    what = "for comparison: PyTorch's update_bn over inference, 3 convolutions"
    yield compare("d", what, pair, "")
