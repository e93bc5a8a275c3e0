"""The named experiments: every setting of a run, in one place.

A function's docstring says how to run its experiment, what to expect and from where
that is known, and how long it takes; its first line is the line in `--help`.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from experiments.settings import ONE_PROCESS, Cluster, Config

__all__ = [
    "DIGITS",
    "DOCSTRINGS",
    "EXPERIMENTS",
    "ONE_PROCESS",
    "Cluster",
    "Config",
    "from_json",
]

# Name -> (one line for `--help`, configuration).
EXPERIMENTS: dict[str, tuple[str, Config]] = {}
DOCSTRINGS: dict[str, str] = {}  # name -> all that is said of it


def _experiment(make: Callable[[], Config]) -> Config:
    """Register what `make` returns under its name."""
    assert make.__doc__ is not None
    name = make.__name__
    config = dataclasses.replace(make(), name=name, workdir=pathlib.Path("runs") / name)
    DOCSTRINGS[name] = make.__doc__
    EXPERIMENTS[name] = make.__doc__.splitlines()[0], config
    return config


_UNNAMED = {"name": "", "workdir": pathlib.Path()}  # filled in by `_experiment`

_DIGITS = Config(
    **_UNNAMED,  # type: ignore[arg-type]
    dataset="digits",
    model="convnet",
    protocol="side_by_side",
    seeds=5,
    epochs=40,
    swa_epochs=(5, 10),
    batch_size=32,
    eval_batch_size=224,
    learning_rate=0.4,
    swa_lr=0.2,
    weight_decay=5e-4,
    pixel_max=16,
    widths=(16, 32, 32),
    strides=(1, 2, 1),
    tune_seeds=5,
    tune_learning_rates=(0.1, 0.2, 0.4),
)


@_experiment
def digits() -> Config:
    """SGD and SWA on scikit-learn's 1,797 digits; about a minute on 2 CPU cores.

    Command: python -m experiments digits
    Expected test accuracy (601 images, so one is 0.17 %; measured here, 5 seeds): SGD
    98.5 ± 0.5 %, SWA over the last 5 epochs 98.4 ± 0.2 %, over the last 10
    98.8 ± 0.2 %, and the latter without the BatchNorm pass 93.6 ± 3.1 %.
    Run time: about a minute on 2 CPU cores.
    Rates and weight decay: python -m experiments digits --tune
    """
    return _DIGITS


@_experiment
def digits_nnx() -> Config:
    """The same network written with Flax's nnx API, to show that both work.

    Command: python -m experiments digits_nnx
    Expected: as `digits`, whose rates it shares.
    Run time: about a minute on 2 CPU cores.
    """
    return dataclasses.replace(_DIGITS, model="nnx_convnet")


_FASHION_MNIST = dataclasses.replace(
    _DIGITS,
    dataset="fashion_mnist",
    batch_size=64,
    eval_batch_size=500,
    learning_rate=0.8,
    pixel_max=255,
    strides=(2, 2, 1),
    tune_seeds=3,
    tune_learning_rates=(0.05, 0.1, 0.2),
)


@_experiment
def fashion_mnist() -> Config:
    """SGD and SWA on Fashion-MNIST; --train-examples 5000 shows the effect sooner.

    Command: python -m experiments fashion_mnist --train-examples 5000
    Expected test accuracy (measured here, 5 seeds): SGD 86.3 ± 0.3 %, SWA over the last
    5 epochs 86.3 ± 0.4 %, over the last 10 86.5 ± 0.5 %, and the latter without the
    BatchNorm pass 76.8 ± 8.8 %; test loss 0.407, 0.398, 0.395 and 0.680.
    Run time: 3 minutes on 2 CPU cores. Without --train-examples it trains on 50,000
    images (10,000 more validate), and an epoch costs ten times as much.
    Rates and weight decay: the same command with --tune
    """
    return _FASHION_MNIST


_FINE_TUNE_5000 = dataclasses.replace(
    _FASHION_MNIST,
    protocol="fine_tune",
    train_examples=5000,
    epochs=30,
    swa_lr=0.05,
    control_lr=0.001,
    tune_learning_rates=(0.4, 0.8),
    tune_swa_lrs=(0.05, 0.1, 0.2, 0.4, 0.8),
)


@_experiment
def fashion_mnist_5000() -> Config:
    """The published table's protocol on 5,000 images, where the baseline overfits.

    Command: python -m experiments fashion_mnist_5000
    Expected test accuracy (measured here, 5 seeds): 86.31 ± 0.10 % before,
    86.30 ± 0.26 % after 5 and 86.35 ± 0.19 % after 10 epochs of SWA; the control after
    10 epochs 86.40 ± 0.18 %, SGD with the whole budget 86.49 ± 0.14 %. SWA does not
    help here.
    Run time: 5 minutes on 2 CPU cores.
    Rates and weight decay: python -m experiments fashion_mnist_5000 --tune
    """
    return _FINE_TUNE_5000


@_experiment
def fashion_mnist_60000() -> Config:
    """The published table's protocol on all of Fashion-MNIST, shifted and mirrored.

    Trains on all 60,000 images; --tune on 50,000, of which the rest validate.

    Command: python -m experiments fashion_mnist_60000
    Expected test accuracy (measured here, 3 seeds): 90.42 ± 0.23 % before,
    90.14 ± 0.23 % after 5 and 90.26 ± 0.24 % after 10 epochs of SWA; the control after
    10 epochs 90.44 ± 0.22 %, SGD with the whole budget 90.55 ± 0.16 %. SWA does not
    help here.
    Run time: about an hour on 2 CPU cores, by its 9,000 images a second.
    Rates and weight decay: python -m experiments fashion_mnist_60000 --tune
    """
    return dataclasses.replace(
        _FINE_TUNE_5000,
        train_examples=None,
        hold_out=False,
        seeds=3,
        epochs=40,
        batch_size=128,
        learning_rate=0.2,
        swa_lr=0.025,
        control_lr=0.001,
        weight_decay=1.25e-4,
        max_shift=2,
        flip=True,
        tune_seeds=1,
        tune_learning_rates=(0.1, 0.2, 0.4),
        tune_weight_decays=(1.25e-4,),
        tune_swa_lrs=(0.0125, 0.025, 0.05),
        tune_control_lrs=(3.16e-4, 1e-3),
    )


@_experiment
def shakespeare() -> Config:
    """The published table's protocol for a language model of Shakespeare's plays.

    A decoder-only Transformer predicts bytes. It has LayerNorm, so averages need no
    pass over the data. The plain arm is AdamW: SGD hardly trains a Transformer.

    Command: python -m experiments shakespeare
    Expected test loss per byte (measured here, 5 seeds; in nats): 1.827 ± 0.035
    before, 1.815 ± 0.034 after 5 and 1.806 ± 0.033 after 10 epochs of SWA; the control
    after 10 epochs 1.813 ± 0.031, AdamW with the whole budget 1.776 ± 0.031.
    Run time: 33 minutes on 2 CPU cores.
    Rates and weight decay: python -m experiments shakespeare --tune
    """
    return Config(
        **_UNNAMED,  # type: ignore[arg-type]
        dataset="shakespeare",
        model="transformer",
        protocol="fine_tune",
        seeds=5,
        train_examples=4000,
        epochs=15,
        swa_epochs=(5, 10),
        batch_size=32,
        eval_batch_size=200,
        context=64,
        layers=2,
        heads=4,
        width=64,
        dropout=0.0,
        optimizer="adamw",
        learning_rate=8e-3,
        swa_lr=2.5e-4,
        control_lr=1e-4,
        weight_decay=1.6,
        tune_seeds=1,
        tune_learning_rates=(2e-3, 4e-3, 8e-3),
        tune_weight_decays=(0.1, 0.4),
        tune_swa_lrs=(1e-3, 2e-3, 4e-3),
        tune_control_lrs=(1e-4, 1e-3),
    )


# The original repository's settings: github.com/timgaripov/swa, README.md at commit
# 411b2fc and train.py. Its SGD schedule moves once an epoch, ours at every step.
_CIFAR = Config(
    **_UNNAMED,  # type: ignore[arg-type]
    dataset="cifar10",
    model="vgg16",
    protocol="budgets",
    hold_out=False,
    seeds=3,
    epochs=200,
    budgets=(1, 1.25, 1.5),
    swa_start=161,
    batch_size=128,
    eval_batch_size=500,
    learning_rate=0.05,
    swa_lr=0.01,
    weight_decay=5e-4,
    decay_all=True,
    max_shift=4,
    flip=True,
    dropout=0.5,
)
_CIFAR_PRERESNET = dataclasses.replace(
    _CIFAR,
    model="preresnet164",
    epochs=150,
    swa_start=126,
    learning_rate=0.1,
    weight_decay=3e-4,
    dropout=None,
)
_CIFAR_WIDE_RESNET = dataclasses.replace(
    _CIFAR, model="wide_resnet28_10", learning_rate=0.1, swa_lr=0.05, dropout=None
)


@_experiment
def cifar10_vgg16() -> Config:
    """VGG16 on CIFAR-10 as in the original repository, at 1, 1.25 and 1.5 budgets.

    Command: python -m experiments cifar10_vgg16
    Expected test accuracy (original repository's README): SGD 93.25 ± 0.16 %, SWA
    93.59 ± 0.16, 93.70 ± 0.22 and 93.64 ± 0.18 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 1,050 epochs of 50,000 images a seed want an accelerator.
    """
    return _CIFAR


@_experiment
def cifar10_vgg16_bn() -> Config:
    """The same with BatchNorm, so that averages need a pass over the data.

    Command: python -m experiments cifar10_vgg16_bn
    Expected: the original repository has this network, but publishes no figures.
    Run time: not measured; 1,050 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(_CIFAR, model="vgg16_bn")


@_experiment
def cifar10_preresnet110() -> Config:
    """PreResNet-110 on CIFAR-10 as in the original repository.

    Command: python -m experiments cifar10_preresnet110
    Expected test accuracy (original repository's README): SGD 95.03 ± 0.05 %, SWA
    95.51 ± 0.10, 95.65 ± 0.03 and 95.82 ± 0.03 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 787 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(_CIFAR_PRERESNET, model="preresnet110")


@_experiment
def cifar10_preresnet164() -> Config:
    """PreResNet-164 on CIFAR-10 as in the original repository.

    Command: python -m experiments cifar10_preresnet164
    Expected test accuracy (original repository's README): SGD 95.28 ± 0.10 %, SWA
    95.56 ± 0.11, 95.77 ± 0.04 and 95.83 ± 0.03 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 787 epochs of 50,000 images a seed want an accelerator.
    """
    return _CIFAR_PRERESNET


@_experiment
def cifar10_wide_resnet() -> Config:
    """WideResNet-28-10 on CIFAR-10 as in the original repository.

    Command: python -m experiments cifar10_wide_resnet
    Expected test accuracy (original repository's README): SGD 96.18 ± 0.11 %, SWA
    96.45 ± 0.11, 96.64 ± 0.08 and 96.79 ± 0.05 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 1,050 epochs of 50,000 images a seed want an accelerator.
    """
    return _CIFAR_WIDE_RESNET


@_experiment
def cifar100_vgg16() -> Config:
    """VGG16 on CIFAR-100 as in the original repository.

    Command: python -m experiments cifar100_vgg16
    Expected test accuracy (original repository's README): SGD 72.55 ± 0.10 %, SWA
    73.91 ± 0.12, 74.17 ± 0.15 and 74.27 ± 0.25 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 1,050 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(_CIFAR, dataset="cifar100")


@_experiment
def cifar100_preresnet110() -> Config:
    """PreResNet-110 on CIFAR-100 as in the original repository.

    Command: python -m experiments cifar100_preresnet110
    Expected test accuracy (original repository's README): SGD 76.77 ± 0.38 %, SWA
    78.75 ± 0.16, 78.91 ± 0.29 and 79.10 ± 0.21 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 787 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(
        _CIFAR_PRERESNET, dataset="cifar100", model="preresnet110", swa_lr=0.05
    )


@_experiment
def cifar100_preresnet164() -> Config:
    """PreResNet-164 on CIFAR-100 as in the original repository.

    Command: python -m experiments cifar100_preresnet164
    Expected test accuracy (original repository's README): SGD 78.49 ± 0.36 %, SWA
    79.77 ± 0.17, 80.18 ± 0.23 and 80.35 ± 0.16 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 787 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(_CIFAR_PRERESNET, dataset="cifar100", swa_lr=0.05)


@_experiment
def cifar100_wide_resnet() -> Config:
    """WideResNet-28-10 on CIFAR-100 as in the original repository.

    Command: python -m experiments cifar100_wide_resnet
    Expected test accuracy (original repository's README): SGD 80.82 ± 0.23 %, SWA
    81.46 ± 0.23, 81.91 ± 0.27 and 82.15 ± 0.27 % at 1, 1.25 and 1.5 budgets.
    Run time: not measured; 1,050 epochs of 50,000 images a seed want an accelerator.
    """
    return dataclasses.replace(_CIFAR_WIDE_RESNET, dataset="cifar100")


# The baseline's settings are those of Goyal et al., arXiv:1706.02677, for batches of
# 256, with a cosine; the rates of the last two are ours and have not been tried.
_IMAGENET = Config(
    **_UNNAMED,  # type: ignore[arg-type]
    dataset="imagenet2012",
    model="resnet50",
    protocol="fine_tune",
    hold_out=False,
    seeds=3,
    epochs=90,
    swa_epochs=(5, 10),
    batch_size=256,
    eval_batch_size=500,
    image_size=224,
    dtype="bfloat16",
    learning_rate=0.1,
    swa_lr=0.01,
    control_lr=0.001,
    weight_decay=1e-4,
    flip=True,
    checkpoint_every=1000,
    width_plot=False,
)


@_experiment
def imagenet_resnet50() -> Config:
    """ResNet-50 on ImageNet: 5 and 10 SWA epochs on a converged model.

    Command: python -m experiments imagenet_resnet50 --parallel jit
    Expected test accuracy (Izmailov et al. 2018, arXiv:1803.05407, ImageNet table):
    76.15 % before, 76.83 ± 0.01 % after 5 and 76.97 ± 0.05 % after 10 epochs of SWA.
    Run time: not measured; 305 epochs of 1.28 million images a seed, equal-budget
    baselines and control included.
    """
    return _IMAGENET


@_experiment
def imagenet_resnet152() -> Config:
    """ResNet-152 on ImageNet: 5 and 10 SWA epochs on a converged model.

    Command: python -m experiments imagenet_resnet152 --parallel jit
    Expected test accuracy (Izmailov et al. 2018, arXiv:1803.05407, ImageNet table):
    78.31 % before, 78.82 ± 0.01 % after 5 and 78.94 ± 0.07 % after 10 epochs of SWA.
    Run time: not measured; 305 epochs of 1.28 million images a seed, equal-budget
    baselines and control included.
    """
    return dataclasses.replace(_IMAGENET, model="resnet152")


DIGITS = EXPERIMENTS["digits"][1]


def from_json(content: dict[str, Any]) -> Config:
    """The configuration that config.json holds.

    Raises:
        KeyError: The experiment is unknown.
        TypeError: A setting is unknown.
        ValueError: A setting is invalid.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content.items()
    }
    values["workdir"] = pathlib.Path(values["workdir"])
    if values["data_dir"] is not None:
        values["data_dir"] = pathlib.Path(values["data_dir"])
    values["cluster"] = Cluster(**values["cluster"])
    return dataclasses.replace(EXPERIMENTS[values["name"]][1], **values)
