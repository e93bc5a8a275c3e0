"""Record the exponential averages of timm, ema-pytorch, diffusers, PyTorch and others.

    python3.11 -m venv /tmp/peers
    /tmp/peers/bin/pip install torch==2.14.1 timm==1.0.31 ema-pytorch==0.8.3 \
        diffusers==0.42.1 keras==3.15.1 optax==0.2.8 jax==0.10.2 numpy==2.4.6
    /tmp/peers/bin/python tests/golden/make_averages.py

Writes ``averages.json``, one run a line, and ``averages.npz``, where the array of a run
is what the average held after each update: a row of nine, weight (3, 2) before bias
(3,). All but Keras see the same models: ``initial`` is what the average is made from,
``models`` are the 16 sets of weights that arrive one an update. They are random and
unrelated, so that no wrong order, count or decay can pass for a right one. Keras moves
its own weights along; those that it reached are recorded beside its averages.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import ema_pytorch
import ema_pytorch.post_hoc_ema
import jax
import keras
import numpy as np
import optax
import torch
from diffusers.training_utils import EMAModel
from make_pytorch import HERE, Arrays, weights, write_arrays
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NUM_MODELS = 16
Row = dict[str, Any]
Recorded = tuple[Row, Arrays]  # the array of the run itself is named ""


def draw() -> tuple[Arrays, list[Arrays]]:
    """The initial weights and the models that follow, as PyTorch names and shapes."""
    rng = np.random.default_rng(0)
    trees = [
        {
            "weight": rng.normal(size=(3, 2)).astype(np.float32),
            "bias": rng.normal(size=3).astype(np.float32),
        }
        for _ in range(1 + NUM_MODELS)
    ]
    return trees[0], trees[1:]


INITIAL, MODELS = draw()


def rows(trees: list[Arrays]) -> np.ndarray:
    """One row a tree, whatever the order of its leaves."""
    return np.stack(
        [np.concatenate([np.ravel(t[name]) for name in INITIAL]) for t in trees]
    )


def load(model: torch.nn.Module, tree: Arrays) -> None:
    """Puts weights into a model, in place."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(tree[name]))


def along(average: Callable[[torch.nn.Module], Any]) -> Iterator[torch.nn.Module]:
    """A model that takes on the weights of each update; ``average`` is made from it."""
    model = torch.nn.Linear(2, 3)
    load(model, INITIAL)
    made = average(model)
    for tree in MODELS:
        load(model, tree)
        yield made, model


def timm(first_step: int | None, **settings: Any) -> Recorded:
    """ModelEmaV3; ``first_step`` is the step that the first update is told."""
    held = []
    for i, (ema, model) in enumerate(along(lambda m: ModelEmaV3(m, **settings))):
        ema.update(model, step=None if first_step is None else first_step + i)
        held.append(weights(ema.module))
    return {"peer": "timm", "first_step": first_step, **settings}, {"": rows(held)}


def ema_pytorch_ema(**settings: Any) -> Recorded:
    """EMA, updated after every update of the model."""
    held = []
    for ema, _ in along(lambda m: ema_pytorch.EMA(m, **settings)):
        ema.update()
        held.append(weights(ema.ema_model))
    return {"peer": "ema_pytorch", **settings}, {"": rows(held)}


def diffusers(**settings: Any) -> Recorded:
    """EMAModel."""
    held = []
    for ema, model in along(lambda m: EMAModel(m.parameters(), **settings)):
        ema.step(model.parameters())
        copy = torch.nn.Linear(2, 3)
        ema.copy_to(copy.parameters())
        held.append(weights(copy))
    return {"peer": "diffusers", **settings}, {"": rows(held)}


def pytorch(decay: float) -> Recorded:
    """AveragedModel with PyTorch's own exponential average."""
    held = []
    function = get_ema_multi_avg_fn(decay)
    for ema, model in along(lambda m: AveragedModel(m, multi_avg_fn=function)):
        ema.update_parameters(model)
        held.append(weights(ema.module))
    return {"peer": "pytorch", "decay": decay}, {"": rows(held)}


def optax_ema(decay: float) -> Recorded:
    """optax.ema with its correction of the bias, fed weights instead of updates."""
    tx = optax.ema(decay, debias=True)
    state, held = tx.init(INITIAL), []
    for tree in MODELS:
        average, state = tx.update(tree, state)
        held.append(jax.device_get(average))
    return {"peer": "optax", "decay": decay}, {"": rows(held)}


def karras(**settings: Any) -> Recorded:
    """ema-pytorch's KarrasEMA, updated after every update of the model."""
    held = []
    for ema, _ in along(lambda m: ema_pytorch.KarrasEMA(m, **settings)):
        ema.update()
        held.append(weights(ema.ema_model))
    return {"peer": "karras", **settings}, {"": rows(held)}


def keras_ema(accumulation: int | None, decay: float) -> Recorded:
    """SGD with use_ema; its gradients move the weights to the next model.

    With ``accumulation`` each gradient is given for that many micro-batches. The
    weights and the average are read after every micro-batch.
    """
    names = ("weight", "bias")
    variables = [keras.Variable(INITIAL[name], name=name) for name in names]
    optimizer = keras.optimizers.SGD(
        1.0,
        use_ema=True,
        ema_momentum=decay,
        ema_overwrite_frequency=None,
        gradient_accumulation_steps=accumulation,
    )
    optimizer.build(variables)

    def read(values: list[Any]) -> Arrays:
        return {n: np.array(v.value) for n, v in zip(names, values, strict=True)}

    averages = optimizer._model_variables_moving_average
    start, models, held = read(averages), [], []
    for tree in MODELS[:: accumulation or 1]:
        now = read(variables)
        gradients = [jax.numpy.asarray(now[name] - tree[name]) for name in names]
        for _ in range(accumulation or 1):
            optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
            models.append(read(variables))
            held.append(read(averages))
    row = {"peer": "keras", "gradient_accumulation_steps": accumulation, "decay": decay}
    return row, {
        "": rows(held),
        "/models": rows(models),
        "/before": rows([start]),
    }


def first_model_share(update_every: int, sigma_rel: float, num_steps: int) -> Row:
    """What KarrasEMA still holds of its first model: that was 1, the others are 0."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    ema = ema_pytorch.KarrasEMA(model, sigma_rel=sigma_rel, update_every=update_every)
    for _ in range(num_steps):
        ema.update()
        torch.nn.init.zeros_(model.weight)
    return {
        "peer": "karras_first_model",
        "sigma_rel": sigma_rel,
        "update_every": update_every,
        "num_steps": num_steps,
        "share": float(ema.ema_model.weight),
    }


def karras_posthoc() -> Recorded:
    """PostHocEMA: what it stored, in float32, and what it makes of that.

    Its coefficients come from the function that it calls, for the snapshots in the
    order of the files (the average's number, then the step).
    """
    sigmas, every, wanted = (0.05, 0.1), 4, (0.05, 0.075)
    module = ema_pytorch.post_hoc_ema
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Linear(2, 3)
        ema = ema_pytorch.PostHocEMA(
            model,
            sigma_rels=sigmas,
            update_every=1,
            checkpoint_every_num_steps=every,
            checkpoint_folder=folder,
            checkpoint_dtype=torch.float32,
        )
        for tree in MODELS:
            load(model, tree)
            ema.update()
        kinds, steps, held = [], [], []
        for kind in range(len(sigmas)):
            for step in range(every, NUM_MODELS + 1, every):
                stored = torch.load(f"{folder}/{kind}.{step}.pt", weights_only=True)
                prefix = "ema_model."
                held.append(
                    {
                        k.removeprefix(prefix): v.numpy()
                        for k, v in stored.items()
                        if k.startswith(prefix)
                    }
                )
                kinds.append(sigmas[kind])
                steps.append(step)
        results = [
            weights(ema.synthesize_ema_model(sigma_rel=sigma).ema_model)
            for sigma in wanted
        ]
    gammas = torch.tensor([module.sigma_rel_to_gamma(sigma) for sigma in kinds])
    coefficients = [
        module.solve_weights(
            torch.tensor(steps),
            gammas,
            torch.tensor([NUM_MODELS]),
            torch.tensor([module.sigma_rel_to_gamma(sigma)]),
        )
        for sigma in wanted
    ]
    row = {
        "peer": "karras_posthoc",
        "sigma_rel": kinds,
        "step": steps,
        "wanted_sigma_rel": wanted,
        "wanted_step": NUM_MODELS,
        "coefficients": [c.squeeze(-1).tolist() for c in coefficients],
    }
    return row, {
        "/snapshots": rows(held),
        "/results": rows(results),
    }


def runs() -> Iterator[Recorded]:
    """Every run."""
    warm = {"use_warmup": True}
    yield timm(1, decay=0.9)
    yield timm(None, decay=0.9)
    yield timm(None, decay=0.9, **warm)
    yield timm(1, decay=0.9999, **warm)
    yield timm(0, decay=0.9999, **warm)
    yield timm(1, decay=0.7, warmup_gamma=2.0, warmup_power=0.75, **warm)
    yield timm(1, decay=0.7, update_after_step=5, **warm)
    yield timm(1, decay=0.9, update_after_step=5)
    yield timm(1, decay=0.9999, min_decay=0.5, warmup_gamma=3.0, **warm)
    yield ema_pytorch_ema(beta=0.9999, update_after_step=0, update_every=1)
    yield ema_pytorch_ema(
        beta=0.7, update_after_step=0, update_every=1, inv_gamma=2.0, power=0.75
    )
    yield ema_pytorch_ema(
        beta=0.9999, update_after_step=5, update_every=1, inv_gamma=3.0, min_value=0.5
    )
    yield ema_pytorch_ema(beta=0.9999, update_after_step=4, update_every=2)
    yield ema_pytorch_ema(beta=0.9999, update_after_step=5, update_every=3)
    yield diffusers(decay=0.9999)
    yield diffusers(decay=0.5)
    yield diffusers(decay=0.9999, update_after_step=5)
    yield diffusers(decay=0.7, use_ema_warmup=True, inv_gamma=2.0, power=0.75)
    yield diffusers(
        decay=0.9999, use_ema_warmup=True, update_after_step=5, min_decay=0.5
    )
    yield from map(pytorch, (0.9, 0.999))
    yield from map(optax_ema, (0.9, 0.999, 0.9999))
    yield karras(sigma_rel=0.1, update_every=1)
    yield karras(gamma=6.0, update_every=4)
    yield keras_ema(None, 0.9)
    yield keras_ema(2, 0.9)
    yield karras_posthoc()
    yield first_model_share(1, 0.05, 10_000), {}
    yield first_model_share(100, 0.05, 10_000), {}
    yield first_model_share(100, 0.1, 10_000), {}


def main() -> None:
    """Writes both files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arrays = {"initial": rows([INITIAL])[0], "models": rows(MODELS)}
    lines = []
    for number, (row, recorded) in enumerate(runs()):
        arrays |= {f"{number}{name}": value for name, value in recorded.items()}
        lines.append("  " + json.dumps({"run": str(number), **row}))
    text = ",\n".join(lines)
    (HERE / "averages.json").write_text(f'{{"runs": [\n{text}\n]}}\n')
    write_arrays("averages.npz", arrays)


if __name__ == "__main__":
    main()
