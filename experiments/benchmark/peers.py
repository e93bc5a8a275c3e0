"""(c): the same by others."""

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import swa_jax
from experiments.benchmark import trees
from experiments.benchmark.alone import Averaging
from experiments.benchmark.measuring import (
    Action,
    Line,
    Options,
    PyTree,
    compare,
    jax_threads,
    take_turns,
)
from experiments.benchmark.training import sgd


def peers(options: Options) -> Iterator[Line]:
    """(c) Time of the others for the same, over ours: above 1 is ahead."""
    params = trees.resnet50_params()
    torch_average = _torch_average(params)
    if torch_average is not None:
        name, update = torch_average
        actions = {"ours": Averaging(params).run, "theirs": update}
        seconds = take_turns(actions, 3 * options.rounds)
        note = f"update_average: {1e3 * statistics.median(seconds['ours']):.1f} ms"
        pair = seconds["theirs"], seconds["ours"]
        yield compare("c", f"time of {name} over ours", pair, "above 1", note)
    optax_swag = _optax_swag()
    if optax_swag is not None:
        actions = {
            "ours": OptimizerStep(params, swa_jax.swa()).run,
            "theirs": OptimizerStep(params, optax_swag).run,
        }
        seconds = take_turns(actions, 3 * options.rounds)
        note = f"sgd and swa(): {1e3 * statistics.median(seconds['ours']):.1f} ms"
        pair = seconds["theirs"], seconds["ours"]
        what = "time of an optimizer step with optax-swag's swa over ours"
        yield compare("c", what, pair, "above 1", note)


class OptimizerStep:
    """SGD's step with an average, state and parameters donated, without a network."""

    def __init__(self, params: PyTree, average: Any) -> None:
        tx = sgd(average)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: PyTree, grads: PyTree) -> PyTree:
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.grads = jax.tree.map(jnp.zeros_like, params)
        self.step = step
        # Copies: optax-swag's init returns the parameters themselves.
        self.state = jax.tree.map(jnp.copy, (params, tx.init(params)))

    def run(self) -> None:
        """One step, waited for."""
        self.state = self.step(self.state, self.grads)
        jax.block_until_ready(self.state)


def torch_model(params: PyTree) -> Any:
    """A module of these weights, for PyTorch with as many threads as JAX has."""
    import torch

    torch.set_num_threads(jax_threads())
    model = torch.nn.Module()
    for number, leaf in enumerate(jax.tree.leaves(params)):
        weight = torch.nn.Parameter(torch.from_numpy(np.array(leaf)))
        model.register_parameter(f"p{number}", weight)
    return model


def _torch_average(params: PyTree) -> tuple[str, Action] | None:
    try:
        import torch
        from torch.optim.swa_utils import AveragedModel
    except ImportError:
        return None
    model = torch_model(params)
    average = AveragedModel(model)
    name = f"PyTorch {torch.__version__} AveragedModel.update_parameters"
    return name, lambda: average.update_parameters(model)


def _optax_swag() -> Any:
    try:
        import optax_swag
    except ImportError:
        return None
    return optax_swag.swa(freq=1)
