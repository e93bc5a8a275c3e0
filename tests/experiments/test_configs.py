import dataclasses
import json
import math
import pathlib

import pytest

from experiments import configs, plans
from experiments.results import config_dict


def test_every_experiment_is_described():
    assert set(configs.EXPERIMENTS) == {
        "digits",
        "digits_nnx",
        "fashion_mnist",
        "fashion_mnist_5000",
        "fashion_mnist_60000",
        "shakespeare",
        *(f"cifar10_{name}" for name in ("vgg16", "vgg16_bn", "wide_resnet")),
        *(f"cifar100_{name}" for name in ("vgg16", "wide_resnet")),
        *(f"cifar{c}_preresnet{d}" for c in (10, 100) for d in (110, 164)),
        "imagenet_resnet50",
        "imagenet_resnet152",
    }
    for name, (description, config) in configs.EXPERIMENTS.items():
        assert config.name == name
        assert config.workdir == pathlib.Path("runs") / name
        assert 20 < len(description) < 90


@pytest.mark.parametrize("name", configs.EXPERIMENTS)
def test_docstrings_give_command_expectation_and_run_time(name):
    text = configs.DOCSTRINGS[name]
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
    _, config = configs.EXPERIMENTS[name]
    arms = plans.make_arms(config)
    assert [arm.epochs for arm in arms] == epochs
    assert arms[-1].averages_from == swa_start
    assert (config.swa_lr, config.weight_decay, config.decay_all) == (
        swa_lr,
        decay,
        True,
    )


def test_configuration_survives_json(tiny, tiny_fine_tune):
    for config in (tiny, tiny_fine_tune, configs.EXPERIMENTS["cifar10_vgg16"][1]):
        content = json.loads(json.dumps(config_dict(config)))
        assert configs.from_json(content) == config


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
        ({"tune_learning_rates": ()}, r"tune_learning_rates is \(\); .* at least one"),
        ({"tune_weight_decays": (0.0,)}, r"tune_weight_decays is \(0.0,\); .* above 0"),
        ({"tune_swa_lrs": (0.1, -1.0)}, r"tune_swa_lrs is \(0.1, -1.0\); .* above 0"),
        ({"tune_swa_lrs": (math.nan,)}, r"tune_swa_lrs is \(nan,\); .* above 0"),
        ({"tune_control_lrs": (0.1,)}, r"tune_control_lrs .* belongs to fine-tuning"),
        ({"context": 64}, "context is 64; it belongs to text, not to digits"),
        ({"layers": 2}, "layers is 2; it belongs to Transformers, not to digits"),
        ({"dropout": 0.1}, "dropout is 0.1; it belongs to VGG16 and Transformers"),
        ({"image_size": 224}, "image_size is 224; it belongs to ImageNet"),
        ({"control_lr": 0.1}, "control_lr is 0.1; it belongs to fine-tuning"),
        ({"widths": None}, "widths is None; digits needs a value"),
    ],
)
def test_settings_that_cannot_run_are_errors(overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configs.DIGITS, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("shakespeare", {"mixup_alpha": 0.2}, "mixup_alpha is 0.2; it belongs to imag"),
        ("shakespeare", {"heads": 3}, "width is 64 with heads=3; each head takes"),
        ("imagenet_resnet50", {"max_shift": 4}, "max_shift is 4; ImageNet has random"),
        ("cifar10_vgg16", {"swa_start": 201}, "swa_start is 201, .* after epoch 200"),
        (
            "cifar10_vgg16",
            {"swa_epochs": (5,)},
            "swa_epochs .* arms of one budget, not",
        ),
        ("fashion_mnist_5000", {"tune_control_lrs": ()}, "tune_control_lrs is .* one"),
        ("cifar10_vgg16", {"budgets": (2, 1)}, r"budgets is \(2, 1\); .* ascending"),
    ],
)
def test_other_settings_that_cannot_run(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(configs.EXPERIMENTS[name][1], **overrides)


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
        dataclasses.replace(configs.DIGITS, cluster=configs.Cluster(*settings))
