"""Record what torchcontrib's ``SWA`` optimizer computes.

    /tmp/torch/bin/pip install torchcontrib==0.0.2
    /tmp/torch/bin/python tests/golden/make_torchcontrib.py

(/tmp/torch as in make_pytorch.py, which has to run first: its BatchNorm inputs
are used again.) Writes ``torchcontrib.json`` (learning rates and sampled steps),
``torchcontrib_average.npz`` (the weights of one run) and
``torchcontrib_bn_update.npz`` next to this script.
"""

import json
import pathlib
import warnings
from typing import Any

import numpy as np
import torch
from make_original import record_bn_update
from make_pytorch import Arrays, stacked, under, weights, write_arrays
from torchcontrib.optim import SWA

HERE = pathlib.Path(__file__).parent
NUM_STEPS, LR, FACTOR = 25, 0.1, 0.97
# (swa_start, swa_freq, swa_lr)
AUTOMATIC = ((10, 5, 0.05), (7, 3, 0.05), (0, 1, 0.05), (0, 4, None), (12, 6, 0.2))
WEIGHTS_OF = (7, 3, 0.05)


def automatic(swa_start: int, swa_freq: int, swa_lr: float | None) -> dict[str, Any]:
    """Automatic mode around SGD, whose rate another scheduler decays each step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    decay = torch.optim.lr_scheduler.MultiplicativeLR(base, lambda _: FACTOR)
    optimizer = SWA(base, swa_start=swa_start, swa_freq=swa_freq, swa_lr=swa_lr)
    rates: list[float] = []
    base.register_step_pre_hook(
        lambda inner, *_: rates.append(float(inner.param_groups[0]["lr"]))
    )
    counts, params, averages = [], [], []
    for _ in range(NUM_STEPS):
        base.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        decay.step()
        counts.append(base.param_groups[0]["n_avg"])
        params.append(weights(model))
        if counts[-1]:
            optimizer.swap_swa_sgd()  # the average, and back
            averages.append(weights(model))
            optimizer.swap_swa_sgd()
    if (swa_start, swa_freq, swa_lr) == WEIGHTS_OF:
        arrays: Arrays = under("params", stacked(params))
        arrays |= under("averages", stacked(averages))
        arrays["n_averaged"] = np.array(counts)
        write_arrays("torchcontrib_average.npz", arrays)
    return {
        "swa_start": swa_start,
        "swa_freq": swa_freq,
        "swa_lr": swa_lr,
        "learning_rates": rates,
        "n_averaged": counts,
    }


def main() -> None:
    """Writes every file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # the order of the two steps
    rows = [automatic(*run) for run in AUTOMATIC]
    head = json.dumps({"lr": LR, "multiplicative_factor": FACTOR})[:-1]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    (HERE / "torchcontrib.json").write_text(f'{head}, "runs": [\n{lines}\n]}}\n')
    record_bn_update(SWA.bn_update, "torchcontrib_bn_update.npz")


if __name__ == "__main__":
    main()
