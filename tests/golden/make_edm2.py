"""Record the power-function averages of EDM2 and what it reconstructs from them.

    git clone https://github.com/NVlabs/edm2 /tmp/edm2
    git -C /tmp/edm2 checkout 4bf8162f601bcc09472ce8a32dd0cbe8889dc8fc
    /tmp/peers/bin/python tests/golden/make_edm2.py /tmp/edm2

(/tmp/peers as in make_averages.py, which has to run first: its models are used again.)
Writes ``edm2.json``: exponents of widths, and the coefficients of snapshots, one case a
line; and ``edm2.npz``: what ``PowerFunctionEMA`` of two widths held after each update
of a run with a fixed batch size, updated as EDM2's training loop updates it.
"""

import argparse
import importlib.util
import json
from typing import Any

import numpy as np
import torch
from make_pytorch import HERE, Arrays, write_arrays

BATCH_SIZE = 512
WIDTHS = (0.05, 0.1)
EXPONENTS_OF = (0.01, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
WANTED = (0.05, 0.06, 0.075, 0.09, 0.1)
# (steps of the snapshots, their widths, the wanted step)
CASES = (
    ([4, 8, 12, 16], WIDTHS, 16),
    ([4, 8, 12, 16], WIDTHS, 12),
    (list(range(125, 1001, 125)), WIDTHS, 1000),
    (list(range(1, 17)), WIDTHS, 16),
    ([100, 150, 400, 1000], (0.05, 0.1, 0.2), 1000),
)


def load_phema(clone: str) -> Any:
    """The module training/phema.py of the clone."""
    spec = importlib.util.spec_from_file_location("phema", f"{clone}/training/phema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def coefficients(
    phema: Any, steps: list[int], widths: tuple[float, ...], wanted_step: int
) -> dict[str, Any]:
    """The coefficients for each wanted width; later snapshots are left out.

    That is what EDM2's script does before it calls the function.
    """
    steps = [step for step in steps if step <= wanted_step]
    pairs = [(step, width) for width in widths for step in steps]
    step, sigma_rel = (list(column) for column in zip(*pairs, strict=True))
    found = phema.solve_posthoc_coefficients(
        step, sigma_rel, [wanted_step] * len(WANTED), list(WANTED)
    )
    return {
        "step": step,
        "sigma_rel": sigma_rel,
        "wanted_step": wanted_step,
        "wanted_sigma_rel": WANTED,
        "coefficients": found.T.tolist(),
    }


def power_averages(phema: Any) -> Arrays:
    """The averages of every width after every update."""
    with np.load(HERE / "averages.npz") as file:
        initial, models = file["initial"], file["models"]

    def load(row: np.ndarray) -> None:
        vector = torch.from_numpy(row)
        torch.nn.utils.vector_to_parameters(vector, net.parameters())

    net = torch.nn.Linear(2, 3)
    load(initial)
    ema = phema.PowerFunctionEMA(net, stds=list(WIDTHS))
    held: list[list[np.ndarray]] = [[] for _ in WIDTHS]
    for i, row in enumerate(models):
        load(row)
        ema.update(cur_nimg=(i + 1) * BATCH_SIZE, batch_size=BATCH_SIZE)
        for rows, (average, _) in zip(held, ema.get(), strict=True):
            vector = torch.nn.utils.parameters_to_vector(average.parameters())
            rows.append(vector.detach().numpy())
    return {str(w): np.stack(rows) for w, rows in zip(WIDTHS, held, strict=True)}


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", help="path of a clone of NVlabs/edm2")
    phema = load_phema(parser.parse_args().clone)
    torch.set_num_threads(1)
    head = {
        "sigma_rel": EXPONENTS_OF,
        "gamma": phema.std_to_exp(np.array(EXPONENTS_OF)).tolist(),
    }
    lines = ",\n".join("  " + json.dumps(coefficients(phema, *case)) for case in CASES)
    text = f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n'
    (HERE / "edm2.json").write_text(text)
    write_arrays("edm2.npz", power_averages(phema))


if __name__ == "__main__":
    main()
