"""(a) and (e): a training step with and without averaging."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments.benchmark.measuring import (
    Line,
    Options,
    PyTree,
    compare,
    in_turn,
    take_turns,
)
from experiments.models.resnet import IMAGENET, STAGES, ResNet


@dataclasses.dataclass
class Training:
    """A donated training step of ResNet-50 and the state that it goes round with."""

    options: Options
    optimizer: optax.GradientTransformationExtraArgs

    def __post_init__(self) -> None:
        """Create parameters and data; compile nothing yet."""
        side = self.options.image_size
        rng = np.random.default_rng(0)
        self.model = ResNet(STAGES[50], data=IMAGENET)
        self.images = jnp.asarray(
            rng.normal(size=(self.options.batch_size, side, side, 3)), jnp.float32
        )
        self.labels = jnp.asarray(rng.integers(0, 1000, self.options.batch_size))
        variables = jax.jit(functools.partial(self.model.init, train=False))(
            jax.random.key(0), self.images[:1]
        )
        params = variables["params"]
        self.state = params, variables["batch_stats"], self.optimizer.init(params)
        self.jitted = jax.jit(self.step, donate_argnums=0)

    def step(self, state: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
        """One update."""
        params, batch_stats, opt_state = state

        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    def run(self) -> None:
        """One update, waited for."""
        self.state = self.jitted(self.state, self.images, self.labels)
        jax.block_until_ready(self.state)

    def compile_seconds(self) -> float:
        """Compile the step from nothing."""
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(self.step, donate_argnums=0).lower(
            self.state, self.images, self.labels
        ).compile()
        return time.perf_counter() - start


def sgd(*links: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that averages are chained to."""
    return optax.chain(optax.sgd(1e-4, momentum=0.9), *links)


def training_steps(options: Options) -> Iterator[Line]:
    """(a) Steps that average, and steps that do not yet."""
    arms = {
        "plain": Training(options, sgd()),
        "sampled": Training(options, sgd(swa_jax.swa())),
        "skipped": Training(options, sgd(swa_jax.swa(start_step=10**9))),
    }
    seconds = take_turns({k: arm.run for k, arm in arms.items()}, options.rounds)
    milliseconds = 1e3 * statistics.median(seconds["plain"])
    note = f"step without swa(): {milliseconds:.0f} ms"
    for name, target in (("sampled", ""), ("skipped", "at most 1.02")):
        pair = seconds[name], seconds["plain"]
        yield compare("a", f"ResNet-50 step with swa(), {name}", pair, target, note)


def compile_time(options: Options) -> Iterator[Line]:
    """(e) Compiling the step with averaging in it."""
    arms = {
        "averaging": Training(options, sgd(swa_jax.swa())),
        "plain": Training(options, sgd()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(max(2, options.rounds // 2)):
        for name in in_turn(arms, number):
            seconds[name].append(arms[name].compile_seconds())
    what = "compiling the ResNet-50 step with swa()"
    note = f"without: {statistics.median(seconds['plain']):.1f} s"
    pair = seconds["averaging"], seconds["plain"]
    yield compare("e", what, pair, "at most 1.05", note)
