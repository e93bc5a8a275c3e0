"""A data directory of the tests' own, and a configuration that trains in moments."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments import configs
from experiments.builders import Examples
from experiments.data import MemorySplit


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture(scope="session")
def tiny_model(data_dir: pathlib.Path) -> configs.Config:
    """Four epochs of 3 steps: 20 examples in batches of 8. Writes nothing."""
    return dataclasses.replace(
        configs.DIGITS,
        workdir=pathlib.Path("/dev/null"),
        data_dir=data_dir,
        seeds=2,
        train_examples=20,
        epochs=4,
        swa_epochs=(1, 3),
        batch_size=8,
        eval_batch_size=16,
        learning_rate=0.1,
        swa_lr=0.05,
        weight_decay=5e-4,
        widths=(4, 4),
        strides=(2, 2),
        tune_seeds=1,
        tune_learning_rates=(0.1,),
        tune_weight_decays=(5e-4,),
        tune_swa_lrs=(0.1,),
        width_plot=False,
    )


@pytest.fixture
def tiny(tiny_model: configs.Config, tmp_path: pathlib.Path) -> configs.Config:
    """The same, with a directory to write to."""
    return dataclasses.replace(tiny_model, workdir=tmp_path / "run")


@pytest.fixture
def tiny_fine_tune(tiny: configs.Config) -> configs.Config:
    """The same, with arms that start from a converged baseline: 4 epochs and 1, 3."""
    return dataclasses.replace(
        tiny, protocol="fine_tune", control_lr=0.01, tune_control_lrs=(0.01,)
    )


@pytest.fixture(scope="session")
def split() -> MemorySplit:
    """Twenty random images, whose labels a network can learn by heart."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (20, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, 20, dtype=np.int32)
    return MemorySplit(Examples(images, labels), num_classes=10)
