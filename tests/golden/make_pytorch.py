"""Record what PyTorch's ``torch.optim.swa_utils`` computes.

    python -m venv /tmp/torch
    /tmp/torch/bin/pip install torch==2.13.0 numpy
    /tmp/torch/bin/python tests/golden/make_pytorch.py

The files are written next to this script: ``pytorch_swalr.json``,
``pytorch_averaged_model.npz``, ``pytorch_update_bn.npz`` and
``pytorch_rejections.json``. Everything runs on one CPU thread from fixed
seeds, so that the same version of PyTorch writes the same bytes again.
"""

import functools
import itertools
import json
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LRScheduler,
    MultiplicativeLR,
)
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

HERE = pathlib.Path(__file__).parent
Arrays = dict[str, np.ndarray]


def write_json(name: str, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes a header and one row a line; floats keep all their digits."""
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"torch": torch.__version__, **header})[:-1]
    (HERE / name).write_text(f'{head}, "runs": [\n{lines}\n]}}\n')


def write_arrays(name: str, arrays: dict[str, Any]) -> None:
    """Writes named arrays, compressed."""
    np.savez_compressed(HERE / name, **arrays)


# Learning rates ---------------------------------------------------------------

NUM_EPOCHS = 20
STEPS_PER_EPOCH = 2
INITIAL_LRS = (0.1, 0.02)  # one a parameter group
SWA_LRS = (0.05, 0.04)  # one group goes down, the other goes up


def main_scheduler(kind: str, optimizer: Optimizer) -> LRScheduler | None:
    """The scheduler of the epochs before SWA; None keeps the rate constant."""
    if kind == "constant":
        return None
    if kind == "cosine":
        return CosineAnnealingLR(optimizer, T_max=NUM_EPOCHS)
    return MultiplicativeLR(optimizer, lr_lambda=lambda _: 0.9)


def swalr_run(
    main: str, swa_start: int, strategy: str, anneal_epochs: int, loop: str
) -> dict[str, Any]:
    """Runs the loop of PyTorch's documentation; keeps the rate of every epoch.

    In loop "documented" the main scheduler steps at the end of epochs 0 to
    ``swa_start`` and SWALR at the end of every later one. In loop "both" the main
    scheduler goes on stepping, just before SWALR does.
    """
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in INITIAL_LRS]
    groups = [
        {"params": [p], "lr": lr} for p, lr in zip(params, INITIAL_LRS, strict=True)
    ]
    optimizer = SGD(groups)
    scheduler = main_scheduler(main, optimizer)
    swa_scheduler = SWALR(
        optimizer,
        swa_lr=list(SWA_LRS),
        anneal_epochs=anneal_epochs,
        anneal_strategy=strategy,
    )
    used = []
    for epoch in range(NUM_EPOCHS):
        rates = set()
        for _ in range(STEPS_PER_EPOCH):
            optimizer.zero_grad()
            sum(p.sum() for p in params).backward()
            rates.add(tuple(float(g["lr"]) for g in optimizer.param_groups))
            optimizer.step()
        (rate,) = rates
        used.append(rate)
        if scheduler is not None and (epoch <= swa_start or loop == "both"):
            scheduler.step()
        if epoch > swa_start:
            swa_scheduler.step()
    return {
        "main": main,
        "loop": loop,
        "swa_start": swa_start,
        "strategy": strategy,
        "anneal_epochs": anneal_epochs,
        "learning_rates": [list(group) for group in zip(*used, strict=True)],
    }


def record_swalr() -> None:
    """SWALR after three kinds of main phase; anneal_epochs 0, 1, 5 and 10."""
    phases = [("constant", -1), ("constant", 3), ("cosine", 3), ("multiplicative", 3)]
    runs = [
        swalr_run(main, swa_start, strategy, anneal_epochs, "documented")
        for (main, swa_start), strategy, anneal_epochs in itertools.product(
            phases, ("cos", "linear"), (0, 1, 5, 10)
        )
    ]
    runs += [
        swalr_run("cosine", 3, strategy, 10, "both") for strategy in ("cos", "linear")
    ]
    header = {
        "num_epochs": NUM_EPOCHS,
        "initial_lrs": INITIAL_LRS,
        "swa_lrs": SWA_LRS,
        "cosine_t_max": NUM_EPOCHS,
        "multiplicative_factor": 0.9,
    }
    write_json("pytorch_swalr.json", header, runs)


def outcome(call: Callable[[], Any]) -> dict[str, str | None]:
    """The type and text of what a call raises; None when it is accepted."""
    try:
        call()
    except Exception as error:  # every kind is recorded, none is expected
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": None}


def record_rejections() -> None:
    """What SWALR, AveragedModel, the exponential average and update_bn refuse."""

    def swalr(**arguments: Any) -> dict[str, Any]:
        params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = SGD([{"params": [p]} for p in params], lr=0.1)
        return {
            "call": "SWALR",
            "arguments": arguments,
            **outcome(lambda: SWALR(optimizer, **arguments)),
        }

    rows = [
        swalr(swa_lr=0.05, anneal_strategy=strategy)
        for strategy in ("cosine", "exp", "", None)
    ]
    rows += [
        swalr(swa_lr=0.05, anneal_epochs=epochs)
        for epochs in (-1, -10, 2.5, 5.0, "10", None, True, 0)
    ]
    rows += [swalr(swa_lr=lrs) for lrs in ([0.05, 0.04, 0.03], [0.05], -0.05)]
    rows += [
        {
            "call": "get_ema_multi_avg_fn",
            "arguments": {"decay": decay},
            **outcome(functools.partial(get_ema_multi_avg_fn, decay)),
        }
        for decay in (-0.1, 1.1)
    ]
    layer = torch.nn.Linear(1, 1)
    functions = {"avg_fn": get_swa_avg_fn(), "multi_avg_fn": get_swa_multi_avg_fn()}
    rows += [
        {
            "call": "AveragedModel",
            "arguments": dict.fromkeys(functions, "a function"),
            **outcome(lambda: AveragedModel(layer, **functions)),
        },
        {
            "call": "update_bn",
            "arguments": {"loader": "a batch with one example"},
            **outcome(lambda: update_bn([torch.ones(1, 6)], dense_network())),
        },
    ]
    write_json("pytorch_rejections.json", {}, rows)


# Averages ---------------------------------------------------------------------


def weights(model: torch.nn.Module) -> Arrays:
    """A copy of the parameters, by name."""
    return {n: p.detach().clone().numpy() for n, p in model.named_parameters()}


def gradients(model: torch.nn.Module) -> Arrays:
    """A copy of the gradients, by name."""
    return {n: p.grad.clone().numpy() for n, p in model.named_parameters()}


def under(prefix: str, arrays: Arrays) -> Arrays:
    """The same arrays, their names prefixed."""
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def stacked(trees: list[Arrays]) -> Arrays:
    """Trees of equal structure, stacked along a new first axis."""
    return {name: np.stack([tree[name] for tree in trees]) for name in trees[0]}


def record_averaged_model() -> None:
    """A whole run of the documented loop, with every gradient and every weight.

    Eight epochs of three steps of SGD with momentum; cosine, then SWALR. The
    documented model averages at the end of the epochs after ``swa_start``. Three
    more averages see the weights after each single step: the default, the one
    that PyTorch uses on accelerators, and an exponential one.
    """
    torch.manual_seed(0)
    num_epochs, steps, swa_start, decay = 8, 3, 4, 0.9
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)
    )
    x = torch.randn(steps, 16, 4)
    y = torch.randn(steps, 16, 2)
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, T_max=num_epochs)
    swa_scheduler = SWALR(
        optimizer, swa_lr=0.25, anneal_epochs=2, anneal_strategy="linear"
    )
    documented = AveragedModel(model)
    every_step = {
        "mean": AveragedModel(model),
        "mean_multi": AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)),
    }
    initial = weights(model)
    trees: dict[str, list[Arrays]] = {"params": [], "grads": []}
    trees |= {key: [] for key in ("documented", *every_step)}
    counts: dict[str, list[int]] = {key: [] for key in ("documented", *every_step)}
    for epoch in range(num_epochs):
        for step in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x[step]), y[step]).backward()
            trees["grads"].append(gradients(model))
            optimizer.step()
            trees["params"].append(weights(model))
            for key, averaged in every_step.items():
                averaged.update_parameters(model)
                trees[key].append(weights(averaged.module))
                counts[key].append(int(averaged.n_averaged))
        if epoch > swa_start:
            documented.update_parameters(model)
            swa_scheduler.step()
        else:
            scheduler.step()
        trees["documented"].append(weights(documented.module))
        counts["documented"].append(int(documented.n_averaged))
    arrays = under("initial", initial)
    for key, recorded in trees.items():
        arrays |= under(key, stacked(recorded))
    arrays |= {f"{key}/n_averaged": np.array(n) for key, n in counts.items()}
    arrays["ema/decay"] = np.array(decay)
    arrays |= bfloat16_average()
    write_arrays("pytorch_averaged_model.npz", arrays)


def bfloat16_average() -> Arrays:
    """The mean of bfloat16 weights, which PyTorch keeps in bfloat16.

    NumPy has no bfloat16; the values are stored as float32, which holds them.
    """
    torch.manual_seed(1)
    layer = torch.nn.Linear(1, 8, bias=False).to(torch.bfloat16)
    averaged = AveragedModel(layer)
    snapshots, means = [], []
    for _ in range(300):
        with torch.no_grad():
            layer.weight.copy_(1 + 0.1 * torch.randn(8, 1))
        averaged.update_parameters(layer)
        snapshots.append(layer.weight.detach().float().numpy().ravel())
        means.append(averaged.module.weight.detach().float().numpy().ravel())
    return {"bfloat16/params": np.stack(snapshots), "bfloat16/mean": np.stack(means)}


# BatchNorm --------------------------------------------------------------------


def dense_network() -> torch.nn.Sequential:
    """Two dense layers, a BatchNorm behind each."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 4),
        torch.nn.BatchNorm1d(4),
    )


def conv_network() -> torch.nn.Sequential:
    """Two convolutions, a BatchNorm behind each; the second one has a stride."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(5),
    )


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The BatchNorm layers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    }


def statistics(model: torch.nn.Module) -> Arrays:
    """A copy of the running mean and variance of every BatchNorm layer."""
    return {
        f"{name}/{kind}": getattr(layer, f"running_{kind}").clone().numpy()
        for name, layer in batch_norms(model).items()
        for kind in ("mean", "var")
    }


def record_update_bn() -> None:
    """update_bn over equal batches, ragged ones, none, and each batch alone."""
    arrays: Arrays = {}
    networks = {
        "dense": (dense_network, (6,), {"equal": [16] * 3, "ragged": [16, 16, 5]}),
        "conv": (conv_network, (3, 6, 6), {"equal": [6] * 3, "ragged": [6, 6, 2]}),
    }
    for seed, (name, (build, shape, cases)) in enumerate(networks.items()):
        torch.manual_seed(seed)
        model = build()
        for layer in batch_norms(model).values():
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias)
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 1, 2)
        model.eval()
        arrays |= under(f"{name}/params", weights(model))
        arrays |= under(f"{name}/initial", statistics(model))
        for case, sizes in cases.items():
            # Batches that differ in level and in spread.
            batches = [
                (1 + i) * torch.randn(size, *shape) + i for i, size in enumerate(sizes)
            ]
            prefix = f"{name}/{case}"
            for i, batch in enumerate(batches):
                arrays[f"{prefix}/batch{i}"] = batch.numpy()
                update_bn([batch], model)
                arrays |= under(f"{prefix}/alone{i}", statistics(model))
            update_bn(batches, model)
            arrays |= under(f"{prefix}/stats", statistics(model))
            # How many values a channel's variance of batch i is taken over.
            for layer_name, counts in value_counts(model, batches).items():
                arrays[f"{prefix}/counts/{layer_name}"] = np.array(counts)
        update_bn([], model)
        arrays |= under(f"{name}/empty/stats", statistics(model))
        if model.training or any(
            not math.isclose(layer.momentum, 0.1)
            for layer in batch_norms(model).values()
        ):
            raise AssertionError("update_bn did not restore the mode or momentum")
    write_arrays("pytorch_update_bn.npz", arrays)


def value_counts(
    model: torch.nn.Module, batches: list[torch.Tensor]
) -> dict[str, list[int]]:
    """For every BatchNorm layer, the values per channel in each batch."""
    counts: dict[str, list[int]] = {name: [] for name in batch_norms(model)}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: counts[name].append(
                inputs[0].numel() // inputs[0].shape[1]
            )
        )
        for name, layer in batch_norms(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return counts


def main() -> None:
    """Writes every file."""
    torch.set_num_threads(1)
    # MultiplicativeLR and SWALR warn about the order of steps; the loops above
    # are PyTorch's own examples.
    warnings.simplefilter("ignore", UserWarning)
    record_swalr()
    record_rejections()
    record_averaged_model()
    record_update_bn()


if __name__ == "__main__":
    main()
