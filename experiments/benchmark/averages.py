"""(g): each average against `swa`, and `ema` against what people use for it today."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import swa_jax
from experiments.benchmark import trees
from experiments.benchmark.alone import Averaging
from experiments.benchmark.measuring import (
    Action,
    Line,
    Options,
    PyTree,
    compare,
    take_turns,
)
from experiments.benchmark.peers import OptimizerStep, torch_model
from experiments.benchmark.training import sgd

DECAY = 0.999

AVERAGES: dict[str, Callable[..., Any]] = {
    f"ema({DECAY})": functools.partial(swa_jax.ema, DECAY),
    "power_ema()": swa_jax.power_ema,
    "lawa(5)": functools.partial(swa_jax.lawa, 5),
    "swag(rank=5)": functools.partial(swa_jax.swag, 5),
}
EMA, _, LAWA, _ = AVERAGES

#: What keeps no more than `swa` does is to cost no more.
TARGETS = {EMA: "at most 1.05"}


def averages(options: Options) -> Iterator[Line]:
    """(g) In an optimizer's step, then alone, then against others."""
    yield from _steps(options)
    yield from _calls(options)
    yield from _others(options)


def _steps(options: Options) -> Iterator[Line]:
    """Steps that average, and steps between two models."""
    params = trees.resnet50_params()

    def arms(whose: str, average: Callable[..., Any]) -> dict[str, OptimizerStep]:
        return {
            f"{whose}, sampled": OptimizerStep(params, average()),
            f"{whose}, skipped": OptimizerStep(params, average(period=10**9)),
        }

    swa = arms("swa()", swa_jax.swa)
    for name, average in AVERAGES.items():
        steps = {**swa, **arms(name, average)}
        actions: dict[str, Action] = {which: step.run for which, step in steps.items()}
        if name == EMA:
            actions["theirs"] = IncrementalUpdate(params).run
        seconds = take_turns(actions, 3 * options.rounds)
        for turn in ("sampled", "skipped"):
            pair = seconds[f"{name}, {turn}"], seconds[f"swa(), {turn}"]
            what = f"sgd's step with {name} over swa(), {turn}"
            note = f"with swa(): {_milliseconds(pair[1])}"
            yield compare("g", what, pair, TARGETS.get(name, ""), note)
        if name == EMA:
            pair = seconds["theirs"], seconds[f"{name}, sampled"]
            what = f"sgd's step with optax.incremental_update over {name}"
            note = f"with {name}: {_milliseconds(pair[1])}"
            yield compare("g", what, pair, "", note)


def _calls(options: Options) -> Iterator[Line]:
    """`update_average` with each."""
    params = trees.resnet50_params()
    swa = Averaging(params).run
    for name, average in AVERAGES.items():
        this = Averaging(params, average()).run
        pair = _in_turns(this, swa, options)
        what = f"update_average with {name} over swa()"
        note = f"with swa(): {_milliseconds(pair[1])}"
        yield compare("g", what, pair, TARGETS.get(name, ""), note)
    wide = Averaging(params, AVERAGES[LAWA]()).run
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow = Averaging(params, AVERAGES[LAWA]()).run
    pair = _in_turns(narrow, wide, options)
    what = f"update_average with {LAWA}, bfloat16 weights over float32"
    yield compare("g", what, pair, "", f"float32: {_milliseconds(pair[1])}")


def _others(options: Options) -> Iterator[Line]:
    """Time of others' exponential average over ours: above 1 is ahead."""
    params = trees.resnet50_params()
    ours = Averaging(params, AVERAGES[EMA]()).run
    for make, target in PEERS:
        other = make(params)
        if other is None:
            continue
        name, update = other
        pair = _in_turns(update, ours, options)
        what = f"time of {name} over update_average with {EMA}"
        yield compare("g", what, pair, target, f"ours: {_milliseconds(pair[1])}")


def _in_turns(
    this: Action, other: Action, options: Options
) -> tuple[list[float], list[float]]:
    seconds = take_turns({"this": this, "other": other}, 3 * options.rounds)
    return seconds["this"], seconds["other"]


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"


class IncrementalUpdate:
    """SGD's step, and Optax's exponential average of its weights, in one program."""

    def __init__(self, params: PyTree) -> None:
        tx = sgd()

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: PyTree, grads: PyTree) -> PyTree:
            params, opt_state, average = state
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, average, 1 - DECAY)
            return params, opt_state, average

        self.grads = jax.tree.map(jnp.zeros_like, params)
        self.step = step
        self.state = jax.tree.map(jnp.copy, (params, tx.init(params), params))

    def run(self) -> None:
        """One step, waited for."""
        self.state = self.step(self.state, self.grads)
        jax.block_until_ready(self.state)


class Weights(nnx.Module):
    """A module of nothing but weights."""

    def __init__(self, params: PyTree) -> None:
        for number, leaf in enumerate(jax.tree.leaves(params)):
            setattr(self, f"p{number}", nnx.Param(leaf))


def _nnx_ema(params: PyTree) -> tuple[str, Action] | None:
    """As Flax's documentation has it, but donated."""
    return _nnx("flax.nnx.EMA in nnx.jit, donated", params)


def _nnx_tree_ema(params: PyTree) -> tuple[str, Action] | None:
    return _nnx("flax.nnx.EMA in nnx.jit, donated, graph=False", params, graph=False)


def _nnx(name: str, params: PyTree, **options: Any) -> tuple[str, Action] | None:
    if not hasattr(nnx, "EMA"):  # before Flax 0.12.8
        return None
    model = Weights(params)
    average = nnx.EMA(model, DECAY, **options)
    update = nnx.jit(lambda ema, new: ema.update(new), donate_argnums=0, **options)

    def run() -> None:
        update(average, model)
        jax.block_until_ready(average.params)

    return name, run


def _torch_ema(params: PyTree) -> tuple[str, Action] | None:
    return _averaged_model(params, "multi_avg_fn", "get_ema_multi_avg_fn")


def _torch_leafwise_ema(params: PyTree) -> tuple[str, Action] | None:
    return _averaged_model(params, "avg_fn", "get_ema_avg_fn")


def _averaged_model(
    params: PyTree, argument: str, maker: str
) -> tuple[str, Action] | None:
    try:
        import torch
        from torch.optim import swa_utils
    except ImportError:
        return None
    model = torch_model(params)
    function = getattr(swa_utils, maker)(DECAY)
    average = swa_utils.AveragedModel(model, **{argument: function})
    name = f"PyTorch {torch.__version__} AveragedModel({argument}={maker}({DECAY}))"
    return name, lambda: average.update_parameters(model)


def _timm_ema(params: PyTree) -> tuple[str, Action] | None:
    try:
        import timm
        from timm.utils import ModelEmaV3
    except ImportError:
        return None
    model = torch_model(params)
    average = ModelEmaV3(model, decay=DECAY)
    return f"timm {timm.__version__} ModelEmaV3", lambda: average.update(model)


PEERS: tuple[tuple[Callable[[PyTree], tuple[str, Action] | None], str], ...] = (
    (_nnx_ema, ""),
    (_nnx_tree_ema, ""),
    (_torch_ema, "at least 5"),
    (_torch_leafwise_ema, ""),
    (_timm_ema, ""),
)
