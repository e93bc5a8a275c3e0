"""Record what the original SWA repository, timgaripov/swa, computes.

    git clone https://github.com/timgaripov/swa /tmp/swa
    git -C /tmp/swa checkout 090b95e289ee7a00df2a1949e698177d3f1f8854
    /tmp/torch/bin/python tests/golden/make_original.py /tmp/swa

(/tmp/torch as in make_pytorch.py, which has to run first: its BatchNorm inputs
are used again.) Runs the repository's own ``train.py`` and ``utils.py``, without
a GPU and on a small data set: the modules that they import and that play no part
in the averaging (torchvision, tabulate, tqdm, the networks) are replaced, and
each function of ``utils.py`` is wrapped by one that calls it and keeps what went
in and came out. Writes ``original_train.json`` (learning rate and sampled epochs
of several runs), ``original_average.npz`` (the weights of one of them) and
``original_bn_update.npz`` next to this script.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import io
import json
import pathlib
import runpy
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from make_pytorch import (
    Arrays,
    conv_network,
    dense_network,
    stacked,
    statistics,
    under,
    weights,
    write_arrays,
)

HERE = pathlib.Path(__file__).parent
LR_INIT, SWA_LR = 0.1, 0.02
# (epochs, swa_start, swa_c_epochs)
RUNS = ((10, 8, 1), (20, 10, 3), (15, 10, 2), (7, 7, 1), (12, 1, 4))
WEIGHTS_OF = (20, 10, 3)


class Points(torch.utils.data.TensorDataset):
    """Forty-five labelled points, called like a torchvision data set."""

    def __init__(self, path: str, **_: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(45, 4, generator=generator)
        y = (x[:, 0] > 0).long()
        super().__init__(x, y)
        self.targets = y.tolist()


def network(num_classes: int) -> torch.nn.Module:
    """A dense network with BatchNorm."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5),
        torch.nn.BatchNorm1d(5),
        torch.nn.ReLU(),
        torch.nn.Linear(5, num_classes),
    )


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules for what train.py imports beside torch and utils."""
    recipe = types.SimpleNamespace(
        base=network, args=(), kwargs={}, transform_train=None, transform_test=None
    )
    contents: dict[str, dict[str, Any]] = {
        "torchvision": {"datasets": types.SimpleNamespace(POINTS=Points)},
        "tabulate": {"tabulate": lambda *_, **__: "\n\n"},
        "tqdm": {"tqdm": lambda iterable: iterable},
        "models": {"Small": recipe},
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = types.ModuleType(name)
        # PyTorch asks for the spec of modules that it finds imported.
        modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(modules[name]).update(attributes)
    return modules


class Recorder:
    """Wraps the repository's functions; keeps rates, epochs and weights."""

    def __init__(self, utils: types.ModuleType) -> None:
        self.learning_rates: list[float] = []
        self.averaged_epochs: list[int] = []
        self.bn_update_epochs: list[int] = []
        self.alphas: list[float] = []
        self.params: list[Arrays] = []
        self.averages: list[Arrays] = []
        self.originals = {
            name: getattr(utils, name)
            for name in (
                "adjust_learning_rate",
                "train_epoch",
                "moving_average",
                "bn_update",
            )
        }

    @property
    def epoch(self) -> int:
        """The current epoch, counted from 0."""
        return len(self.learning_rates) - 1

    def adjust_learning_rate(self, optimizer: torch.optim.Optimizer, lr: float) -> Any:
        """Keeps the rate that the optimizer has afterwards: an epoch begins."""
        result = self.originals["adjust_learning_rate"](optimizer, lr)
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.learning_rates.append(float(rate))
        return result

    def train_epoch(self, loader: Any, model: torch.nn.Module, *rest: Any) -> Any:
        """Keeps the weights at the end of the epoch."""
        result = self.originals["train_epoch"](loader, model, *rest)
        self.params.append(weights(model))
        return result

    def moving_average(
        self, average: torch.nn.Module, model: torch.nn.Module, alpha: float
    ) -> None:
        """Keeps the epoch and the average after it."""
        self.originals["moving_average"](average, model, alpha)
        self.averaged_epochs.append(self.epoch)
        self.alphas.append(alpha)
        self.averages.append(weights(average))

    def bn_update(self, loader: Any, model: torch.nn.Module) -> None:
        """Keeps the epoch."""
        self.originals["bn_update"](loader, model)
        self.bn_update_epochs.append(self.epoch)


def train(checkout: pathlib.Path, utils: types.ModuleType, run: Any) -> Recorder:
    """One run of train.py, recorded."""
    epochs, swa_start, swa_c_epochs = run
    recorder = Recorder(utils)
    with tempfile.TemporaryDirectory() as directory:
        options = {
            "dir": directory,
            "dataset": "POINTS",
            "model": "Small",
            "batch_size": 16,
            "num_workers": 0,
            "epochs": epochs,
            "lr_init": LR_INIT,
            "swa_start": swa_start,
            "swa_lr": SWA_LR,
            "swa_c_epochs": swa_c_epochs,
        }
        argv = ["train.py", "--swa"] + [f"--{k}={v}" for k, v in options.items()]
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.callback(setattr, sys, "argv", sys.argv)
            sys.argv = argv
            for name, original in recorder.originals.items():
                stack.callback(setattr, utils, name, original)
                setattr(utils, name, getattr(recorder, name))
            runpy.run_path(str(checkout / "train.py"), run_name="__main__")
    return recorder


def record_train(checkout: pathlib.Path, utils: types.ModuleType) -> None:
    """The rates and sampled epochs of every run; the weights of one."""
    rows = []
    for run in RUNS:
        recorder = train(checkout, utils, run)
        epochs, swa_start, swa_c_epochs = run
        rows.append(
            {
                "epochs": epochs,
                "swa_start": swa_start,
                "swa_c_epochs": swa_c_epochs,
                "learning_rates": recorder.learning_rates,
                "averaged_epochs": recorder.averaged_epochs,
                "alphas": recorder.alphas,
                "bn_update_epochs": recorder.bn_update_epochs,
            }
        )
        if run == WEIGHTS_OF:
            arrays = under("params", stacked(recorder.params))
            arrays |= under("averages", stacked(recorder.averages))
            arrays["averaged_epochs"] = np.array(recorder.averaged_epochs)
            write_arrays("original_average.npz", arrays)
    head = json.dumps({"lr_init": LR_INIT, "swa_lr": SWA_LR})[:-1]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    (HERE / "original_train.json").write_text(f'{head}, "runs": [\n{lines}\n]}}\n')


def record_bn_update(bn_update: Callable[..., None], name: str) -> None:
    """bn_update on the networks and batches that make_pytorch.py recorded."""
    golden = dict(np.load(HERE / "pytorch_update_bn.npz"))
    arrays: Arrays = {}
    for kind, build in (("dense", dense_network), ("conv", conv_network)):
        model = build()
        state = {
            key.removeprefix(f"{kind}/params/"): torch.from_numpy(value)
            for key, value in golden.items()
            if key.startswith(f"{kind}/params/")
        }
        model.load_state_dict(state, strict=False)
        for case in ("equal", "ragged"):
            batches = [
                torch.from_numpy(golden[f"{kind}/{case}/batch{i}"]) for i in range(3)
            ]
            with torch.no_grad():
                bn_update([(batch, None) for batch in batches], model)
            arrays |= under(f"{kind}/{case}/stats", statistics(model))
    write_arrays(name, arrays)


def main() -> None:
    """Writes every file."""
    checkout = pathlib.Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # pinned memory without a GPU
    # The repository moves everything to a GPU.
    stay = functools.partialmethod(lambda self, *_, **__: self)
    torch.Tensor.cuda = stay
    torch.nn.Module.cuda = stay
    sys.modules.update(stand_ins())
    sys.path.insert(0, str(checkout))
    utils = importlib.import_module("utils")
    record_train(checkout, utils)
    record_bn_update(utils.bn_update, "original_bn_update.npz")


if __name__ == "__main__":
    main()
