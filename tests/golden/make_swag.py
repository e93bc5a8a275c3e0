"""Record what the SWAG of its authors collects and draws.

    git clone https://github.com/wjmaddox/swa_gaussian /tmp/swag
    git -C /tmp/swag checkout 61a918fa1c3e732dd19fc278ad3a5969f24d5a72
    /tmp/peers/bin/pip install tqdm
    /tmp/peers/bin/python tests/golden/make_swag.py /tmp/swag

(/tmp/peers as in make_averages.py.) Writes ``swag.npz``: for three collections of
models of 4 parameters (weight (2, 1), bias (2,), flattened in this order) the models,
and the mean, the mean of squares and the deviations that ``SWAG.collect_model`` made of
them; and the mean and covariance of 20,000 draws of ``SWAG.sample``.

gpytorch serves its likelihood only: empty modules stand in for the old release that it
asks for. ``sample`` moves every draw to a GPU; here ``cuda`` leaves it where it is.
"""

import argparse
import sys
import types
from typing import Any

import numpy as np
import torch
from make_pytorch import Arrays, under, write_arrays

NUM_DRAWS = 20_000
MAX_NUM_MODELS = 20
MEAN = np.array([0.5, -1.0, 2.0, 0.0])
ROOT = np.array(
    [[1.0, 0.0, 0.0, 0.0], [0.8, 0.5, 0.0, 0.0], [-0.5, 0.2, 0.3, 0.0], [0, 0.1, 0, 2]]
)  # of the covariance that the models have: ROOT @ ROOT.T
# (name, models, offset of the mean, factor of the spread)
COLLECTIONS = (("many", 300, 0.0, 1.0), ("few", 5, 0.0, 1.0), ("far", 40, 300.0, 0.01))
# (collection, name, arguments of sample)
DRAWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("many", "scale1", {"scale": 1.0, "cov": True}),
    ("many", "scale05", {"scale": 0.5, "cov": True}),
    ("many", "diagonal", {"scale": 1.0, "cov": False}),
    ("many", "block", {"scale": 0.5, "cov": True, "block": True}),
    ("few", "scale1", {"scale": 1.0, "cov": True}),
)


def load_swag(clone: str) -> Any:
    """The class SWAG of the clone."""
    for name in ("gpytorch", "gpytorch.lazy", "gpytorch.distributions"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("RootLazyTensor", "DiagLazyTensor", "AddedDiagLazyTensor"):
        setattr(sys.modules["gpytorch.lazy"], name, None)
    distributions: Any = sys.modules["gpytorch.distributions"]
    distributions.MultivariateNormal = None
    # The package itself imports its data sets; these two modules do not need them.
    for name in ("swag", "swag.posteriors"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [f"{clone}/{name.replace('.', '/')}"]
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    from swag.posteriors.swag import SWAG

    return SWAG


def flat(swag: Any, suffix: str) -> np.ndarray:
    """One buffer of every tensor, side by side; rows are kept."""
    parts = [getattr(module, name + suffix) for module, name in swag.params]
    rows = -1 if suffix != "_cov_mat_sqrt" else len(parts[0])
    shape = (rows, 4) if rows > 0 else (4,)
    parts = [p.reshape(rows, -1) if rows > 0 else p.reshape(-1) for p in parts]
    return torch.cat(parts, dim=-1).detach().numpy().reshape(shape)


def draws(swag: Any, arguments: dict[str, Any]) -> Arrays:
    """The moments of draws, taken in float64."""
    torch.manual_seed(0)
    rows = np.empty((NUM_DRAWS, 4))
    for row in rows:
        swag.sample(**arguments)
        row[:] = flat(swag, "")
    return {"mean": rows.mean(0), "cov": np.cov(rows.T)}


def collection(
    swag_class: Any, num_models: int, offset: float, factor: float
) -> tuple[Any, Arrays]:
    """Collects models of a known Gaussian."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(num_models, 4)) @ ROOT.T
    models = (MEAN + offset + factor * noise).astype(np.float32)
    layer = torch.nn.Linear(1, 2)
    swag = swag_class(
        torch.nn.Linear,
        no_cov_mat=False,
        max_num_models=MAX_NUM_MODELS,
        in_features=1,
        out_features=2,
    )
    for model in models:
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(model[:2, None]))
            layer.bias.copy_(torch.from_numpy(model[2:]))
        swag.collect_model(layer)
    return swag, {
        "models": models,
        "mean": flat(swag, "_mean"),
        "sq_mean": flat(swag, "_sq_mean"),
        "deviations": flat(swag, "_cov_mat_sqrt"),
    }


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", help="path of a clone of wjmaddox/swa_gaussian")
    swag_class = load_swag(parser.parse_args().clone)
    torch.set_num_threads(1)
    arrays: Arrays = {
        "num_draws": np.array(NUM_DRAWS),
        "max_num_models": np.array(MAX_NUM_MODELS),
    }
    for name, number, offset, factor in COLLECTIONS:
        swag, collected = collection(swag_class, number, offset, factor)
        arrays |= under(name, collected)
        for of, draw, arguments in DRAWS:
            if of == name:
                arrays |= under(f"{name}/{draw}", draws(swag, arguments))
    write_arrays("swag.npz", arrays)


if __name__ == "__main__":
    main()
