import json
import math
import pathlib

import pytest

from experiments.config.named import DIGITS, EXPERIMENTS
from experiments.config.schema import (
    FineTuneTuning,
    _leaves,
    from_settings,
    override,
    settings_of,
)
from experiments.runtime.processes import Cluster


def test_every_experiment_is_described():
    assert set(EXPERIMENTS) == {
        "digits",
        "digits_nnx",
        "fashion_mnist",
        "fashion_mnist_5000",
        "fashion_mnist_60000",
        "shakespeare",
        *(f"any_budget{data}" for data in ("", "_60000", "_shakespeare")),
        *(f"noisy_labels{share}" for share in ("", "_20", "_0")),
        *(
            f"fashion_mnist_{name}{noise}"
            for name in ("preresnet", "wide_resnet")
            for noise in ("", "_noisy")
        ),
        *(f"cifar10_{name}" for name in ("vgg16", "vgg16_bn", "wide_resnet")),
        *(f"cifar100_{name}" for name in ("vgg16", "wide_resnet")),
        *(f"cifar{c}_preresnet{d}" for c in (10, 100) for d in (110, 164)),
        "imagenet_resnet50",
        "imagenet_resnet152",
    }
    for name, experiment in EXPERIMENTS.items():
        config = experiment.config
        assert config.name == name
        assert config.workdir == pathlib.Path("runs") / name
        assert 20 < len(experiment.summary) < 90


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_docstrings_give_command_expectation_and_run_time(name):
    text = EXPERIMENTS[name].text
    assert f"Command: python -m experiments {name}" in text
    assert "Expected" in text
    assert "Run time:" in text


@pytest.mark.parametrize(
    ("name", "epochs", "swa_start", "swa_lr", "decay"),
    [
        ("cifar100_vgg16", [200, 250, 300, 300], 161, 0.01, 5e-4),
        ("cifar10_preresnet164", [150, 187, 225, 225], 126, 0.01, 3e-4),
        ("cifar100_preresnet110", [150, 187, 225, 225], 126, 0.05, 3e-4),
        ("cifar10_wide_resnet", [200, 250, 300, 300], 161, 0.05, 5e-4),
    ],
)
def test_settings_of_the_original_repository(name, epochs, swa_start, swa_lr, decay):
    config = EXPERIMENTS[name].config
    arms = list(config.plan)
    assert [arm.epochs for arm in arms] == epochs
    assert arms[-1].averages_from == swa_start
    optimizer = config.optimizer
    assert (config.protocol.swa_lr, optimizer.weight_decay) == (swa_lr, decay)
    assert optimizer.decay_all


def test_configuration_survives_json(tiny):
    for config in (tiny, *(each.config for each in EXPERIMENTS.values())):
        content = json.loads(json.dumps(settings_of(config)))
        assert from_settings(EXPERIMENTS[config.name].config, content) == config


def test_configuration_of_an_earlier_version_is_read():
    """docs/results has them: flat, with a None for what did not apply."""
    root = pathlib.Path(__file__).parents[2] / "docs" / "results"
    for name in ("fashion_mnist_60000", "shakespeare"):
        content = json.loads((root / name / "results.json").read_text())["config"]
        assert "dataset" in content
        found = from_settings(EXPERIMENTS[name].config, content)
        assert found == EXPERIMENTS[name].config


def test_unknown_settings_are_an_error():
    with pytest.raises(TypeError, match=r"layers, width: no setting of digits"):
        override(DIGITS, layers=2, width=3, epochs=20)


def test_names_of_settings_are_unique():
    """So that they can stand flat, on the command line and in config.json."""
    for experiment in EXPERIMENTS.values():
        names = [name for name, _, _ in _leaves(experiment.config)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"swa_lr": float("nan")}, "swa_lr is nan; it must be above 0"),
        ({"train_examples": 1}, "train_examples is 1; BatchNorm needs at least 2"),
        ({"max_shift": -1}, "max_shift is -1; it must not be negative"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0; it must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; .* less than 1"),
        ({"epochs": 10}, r"contains 10 with epochs=10.*Raise --epochs"),
        ({"swa_epochs": (0,)}, "swa_epochs contains 0 .* must be at least 1"),
        ({"swa_epochs": ()}, "swa_epochs is empty; .* --swa-epochs 5 10"),
        ({"swa_epochs": (5, 5)}, r"swa_epochs is \(5, 5\); each window .* once"),
        ({"strides": (1,)}, r"strides is \(1,\); give one of each"),
        ({"widths": (4, 0, 4)}, r"widths is \(4, 0, 4\); .* numbers of at least 1"),
        ({"strides": (1, -1, 1)}, r"strides is \(1, -1, 1\); .* at least 1"),
    ],
)
def test_settings_that_cannot_run_are_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        override(DIGITS, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("shakespeare", {"dropout": 1.0}, "dropout is 1.0; .* less than 1"),
        ("shakespeare", {"heads": 3}, "width is 64 with heads=3; each head takes"),
        ("imagenet_resnet50", {"max_shift": 4}, "max_shift is 4; ImageNet has random"),
        ("cifar10_vgg16", {"swa_start": 201}, "swa_start is 201, .* after epoch 200"),
        ("fashion_mnist_5000", {"control_lr": 0.0}, "control_lr is 0.0; .* above 0"),
        ("cifar10_vgg16", {"budgets": (2, 1)}, r"budgets is \(2, 1\); .* ascending"),
    ],
)
def test_other_settings_that_cannot_run(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        override(EXPERIMENTS[name].config, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tune_seeds": 0}, "tune_seeds is 0; it must be at least 1"),
        ({"tune_learning_rates": ()}, r"tune_learning_rates is \(\); .* at least one"),
        ({"tune_weight_decays": (0.0,)}, r"tune_weight_decays is \(0.0,\); .* above 0"),
        ({"tune_swa_lrs": (0.1, -1.0)}, r"tune_swa_lrs is \(0.1, -1.0\); .* above 0"),
        ({"tune_swa_lrs": (math.nan,)}, r"tune_swa_lrs is \(nan,\); .* above 0"),
        ({"tune_control_lrs": ()}, "tune_control_lrs is .* at least one"),
    ],
)
def test_grids_that_cannot_be_searched(overrides, message):
    with pytest.raises(ValueError, match=message):
        FineTuneTuning(**overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((False, "host:1", 2, None), "are host:1, 2, None; give all three, or none"),
        ((False, None, 2, 0), "are None, 2, 0; give all three, or none"),
        ((False, "host:1", 2, 2), "process_id is 2 with num_processes=2; .* from 0"),
        ((False, "host:1", 2, -1), "process_id is -1 with num_processes=2"),
        ((True, "host:1", 2, 0), "distributed is set along with coordinator_address"),
    ],
)
def test_clusters_that_cannot_be_joined_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Cluster(*settings)
