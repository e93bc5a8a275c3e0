"""The named experiments: every setting of a run, in one place.

Each says how to run it, what to expect and from where that is known, and how long it
takes; its first line is the line in `--help`.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from experiments.config.schema import (
    Config,
    FineTuneTuning,
    Saving,
    Tuning,
    from_settings,
    override,
)
from experiments.data.cifar import Cifar10, Cifar100
from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FashionMnist
from experiments.data.imagenet import ImageNet
from experiments.data.shakespeare import Shakespeare
from experiments.models.convnet import ConvNet
from experiments.models.from_nnx import NnxConvNet
from experiments.models.preresnet import PreResNet
from experiments.models.resnet import STAGES, ResNet
from experiments.models.transformer import Transformer
from experiments.models.vgg import VGG16
from experiments.models.wide_resnet import WideResNet
from experiments.runtime.errors import StorageError
from experiments.runtime.workdir import Workdir
from experiments.training.optimizer import Optimizer
from experiments.training.protocols import Budgets, FineTune, SideBySide


class Experiment(NamedTuple):
    """A named experiment."""

    text: str  # all that is said of it
    config: Config
    tuning: Tuning

    @property
    def summary(self) -> str:
        """One line for `--help`."""
        return self.text.splitlines()[0]


EXPERIMENTS: dict[str, Experiment] = {}


def _experiment(name: str, config: Config, tuning: Tuning, text: str) -> None:
    places = {"name": name, "workdir": pathlib.Path("runs") / name}
    named = dataclasses.replace(config, **places)  # type: ignore[arg-type]
    EXPERIMENTS[name] = Experiment(text.strip(), named, tuning)


_DIGITS = Config(
    data=Digits(batch_size=32, eval_batch_size=224),
    model=ConvNet(widths=(16, 32, 32), strides=(1, 2, 1)),
    optimizer=Optimizer(learning_rate=0.4, weight_decay=5e-4),
    protocol=SideBySide(epochs=40, swa_epochs=(5, 10), swa_lr=0.2),
    seeds=5,
)
_DIGITS_TUNING = Tuning(tune_seeds=5, tune_learning_rates=(0.1, 0.2, 0.4))

_experiment(
    "digits",
    _DIGITS,
    _DIGITS_TUNING,
    """SGD and SWA on scikit-learn's 1,797 digits; about a minute on 2 CPU cores.

Command: python -m experiments digits
Expected test accuracy (601 images, so one is 0.17 %): docs/results/digits.
Run time: about a minute on 2 CPU cores.
Rates and weight decay: python -m experiments tune digits
""",
)
_experiment(
    "digits_nnx",
    dataclasses.replace(_DIGITS, model=NnxConvNet((16, 32, 32), (1, 2, 1))),
    _DIGITS_TUNING,
    """The same network written with Flax's nnx API, to show that both work.

Command: python -m experiments digits_nnx
Expected: as `digits`, whose rates it shares.
Run time: about a minute on 2 CPU cores.
""",
)

_FASHION_MNIST = dataclasses.replace(
    _DIGITS,
    data=FashionMnist(batch_size=64, eval_batch_size=500),
    model=ConvNet(widths=(16, 32, 32), strides=(2, 2, 1)),
    optimizer=Optimizer(learning_rate=0.8, weight_decay=5e-4),
)
_FASHION_MNIST_TUNING = Tuning(tune_seeds=3)

_experiment(
    "fashion_mnist",
    _FASHION_MNIST,
    _FASHION_MNIST_TUNING,
    """SGD and SWA on Fashion-MNIST; --train-examples 5000 shows the effect sooner.

Command: python -m experiments fashion_mnist --train-examples 5000
Expected test accuracy of that: docs/results/fashion_mnist.
Run time: 3 minutes on 2 CPU cores. Without --train-examples it trains on 50,000
images (10,000 more validate), and an epoch costs ten times as much.
Rates and weight decay: python -m experiments tune fashion_mnist, likewise
""",
)

_FINE_TUNE_5000 = dataclasses.replace(
    _FASHION_MNIST,
    data=FashionMnist(batch_size=64, eval_batch_size=500, train_examples=5000),
    protocol=FineTune(epochs=30, swa_epochs=(5, 10), swa_lr=0.05, control_lr=0.001),
)

_experiment(
    "fashion_mnist_5000",
    _FINE_TUNE_5000,
    FineTuneTuning(
        tune_seeds=3,
        tune_learning_rates=(0.4, 0.8),
        tune_swa_lrs=(0.05, 0.1, 0.2, 0.4, 0.8),
    ),
    """The published table's protocol on 5,000 images, where the baseline overfits.

Command: python -m experiments fashion_mnist_5000
Expected test accuracy: docs/results/fashion_mnist_5000. SWA does not help here.
Run time: 5 minutes on 2 CPU cores.
Rates and weight decay: python -m experiments tune fashion_mnist_5000
""",
)
_experiment(
    "fashion_mnist_60000",
    override(
        _FINE_TUNE_5000,
        train_examples=None,
        hold_out=False,
        seeds=3,
        epochs=40,
        batch_size=128,
        learning_rate=0.2,
        swa_lr=0.025,
        weight_decay=1.25e-4,
        max_shift=2,
        flip=True,
    ),
    FineTuneTuning(
        tune_learning_rates=(0.1, 0.2, 0.4),
        tune_weight_decays=(1.25e-4,),
        tune_swa_lrs=(0.0125, 0.025, 0.05),
        tune_control_lrs=(3.16e-4, 1e-3),
    ),
    """The published table's protocol on all of Fashion-MNIST, shifted and mirrored.

Trains on all 60,000 images; tuning on 50,000, of which the rest validate.

Command: python -m experiments fashion_mnist_60000
Expected test accuracy: docs/results/fashion_mnist_60000. SWA does not help here.
Run time: about an hour on 2 CPU cores, by its 9,000 images a second.
Rates and weight decay: python -m experiments tune fashion_mnist_60000
""",
)
_experiment(
    "shakespeare",
    Config(
        data=Shakespeare(
            train_examples=4000, batch_size=32, eval_batch_size=200, context=64
        ),
        model=Transformer(layers=2, heads=4, width=64),
        optimizer=Optimizer(optimizer="adamw", learning_rate=8e-3, weight_decay=1.6),
        protocol=FineTune(
            epochs=15, swa_epochs=(5, 10), swa_lr=2.5e-4, control_lr=1e-4
        ),
        seeds=5,
    ),
    FineTuneTuning(
        tune_learning_rates=(2e-3, 4e-3, 8e-3),
        tune_weight_decays=(0.1, 0.4),
        tune_swa_lrs=(1e-3, 2e-3, 4e-3),
        tune_control_lrs=(1e-4, 1e-3),
    ),
    """The published table's protocol for a language model of Shakespeare's plays.

A decoder-only Transformer predicts bytes. It has LayerNorm, so averages need no
pass over the data. The plain arm is AdamW: SGD hardly trains a Transformer.

Command: python -m experiments shakespeare
Expected test loss per byte: docs/results/shakespeare.
Run time: 33 minutes on 2 CPU cores.
Rates and weight decay: python -m experiments tune shakespeare
""",
)


# The original repository's settings: github.com/timgaripov/swa, README.md at commit
# 411b2fc and train.py. Its SGD schedule moves once an epoch, ours at every step.
_CIFAR_NETWORKS = {
    "vgg16": VGG16(False),
    "vgg16_bn": VGG16(True),
    "preresnet110": PreResNet(110),
    "preresnet164": PreResNet(164),
    "wide_resnet": WideResNet(),
}
# Test accuracy (%) in its README: of SGD, and of SWA at 1, 1.25 and 1.5 budgets.
_CIFAR = {
    "cifar10_vgg16": "93.25 ± 0.16, 93.59 ± 0.16, 93.70 ± 0.22, 93.64 ± 0.18",
    "cifar10_vgg16_bn": "",
    "cifar10_preresnet110": "95.03 ± 0.05, 95.51 ± 0.10, 95.65 ± 0.03, 95.82 ± 0.03",
    "cifar10_preresnet164": "95.28 ± 0.10, 95.56 ± 0.11, 95.77 ± 0.04, 95.83 ± 0.03",
    "cifar10_wide_resnet": "96.18 ± 0.11, 96.45 ± 0.11, 96.64 ± 0.08, 96.79 ± 0.05",
    "cifar100_vgg16": "72.55 ± 0.10, 73.91 ± 0.12, 74.17 ± 0.15, 74.27 ± 0.25",
    "cifar100_preresnet110": "76.77 ± 0.38, 78.75 ± 0.16, 78.91 ± 0.29, 79.10 ± 0.21",
    "cifar100_preresnet164": "78.49 ± 0.36, 79.77 ± 0.17, 80.18 ± 0.23, 80.35 ± 0.16",
    "cifar100_wide_resnet": "80.82 ± 0.23, 81.46 ± 0.23, 81.91 ± 0.27, 82.15 ± 0.27",
}


def _cifar(name: str, published: str) -> None:
    kind, network = name.split("_", 1)
    model, dataset = _CIFAR_NETWORKS[network], {"cifar10": Cifar10}.get(kind, Cifar100)
    vgg, short = isinstance(model, VGG16), isinstance(model, PreResNet)
    epochs = 150 if short else 200
    low = vgg or (short and dataset is Cifar10)
    config = Config(
        data=dataset(
            hold_out=False, batch_size=128, eval_batch_size=500, max_shift=4, flip=True
        ),
        model=model,
        optimizer=Optimizer(
            learning_rate=0.05 if vgg else 0.1,
            weight_decay=3e-4 if short else 5e-4,
            decay_all=True,
        ),
        protocol=Budgets(
            epochs=epochs,
            budgets=(1, 1.25, 1.5),
            swa_start=126 if short else 161,
            swa_lr=0.01 if low else 0.05,
        ),
        seeds=3,
    )
    expected = "Expected: the repository has this network, but publishes no figures."
    if published:
        sgd, swa = published.split(", ", 1)
        expected = (
            f"Expected test accuracy (original repository's README): SGD {sgd} %, SWA\n"
            f"{swa} % at 1, 1.25 and 1.5 budgets."
        )
    trained = sum(int(budget * epochs) for budget in (1, 1.25, 1.5, 1.5))
    _experiment(
        name,
        config,
        Tuning(),
        f"""{network} on CIFAR-{kind[5:]} as in the original repository.

Command: python -m experiments {name}
{expected}
Run time: not measured; {trained:,} epochs of 50,000 images a seed want an accelerator.
""",
    )


for _name, _published in _CIFAR.items():
    _cifar(_name, _published)


# The baseline's settings are those of Goyal et al., arXiv:1706.02677, for batches of
# 256, with a cosine; the rates of the last two are ours and have not been tried.
def _imagenet(depth: int, published: str) -> None:
    name = f"imagenet_resnet{depth}"
    config = Config(
        data=ImageNet(hold_out=False, batch_size=256, eval_batch_size=500, flip=True),
        model=ResNet(stages=STAGES[depth], dtype="bfloat16"),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=1e-4),
        protocol=FineTune(epochs=90, swa_epochs=(5, 10), swa_lr=0.01, control_lr=0.001),
        seeds=3,
        saving=Saving(checkpoint_every=1000, width_plot=False),
    )
    _experiment(
        name,
        config,
        FineTuneTuning(),
        f"""ResNet-{depth} on ImageNet: 5 and 10 SWA epochs on a converged model.

Command: python -m experiments {name} --parallel jit
Expected test accuracy (Izmailov et al. 2018, arXiv:1803.05407, ImageNet table):
{published} epochs of SWA.
Run time: not measured; 305 epochs of 1.28 million images a seed, equal-budget
baselines and control included.
""",
    )


_imagenet(50, "76.15 % before, 76.83 ± 0.01 % after 5 and 76.97 ± 0.05 % after 10")
_imagenet(152, "78.31 % before, 78.82 ± 0.01 % after 5 and 78.94 ± 0.07 % after 10")

DIGITS = EXPERIMENTS["digits"].config


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the job in a work directory, wherever that is by now.

    Raises:
        StorageError: There is none.
    """
    directory = Workdir(workdir)
    try:
        content = directory.read_settings()
        default = EXPERIMENTS[content["name"]].config
        return from_settings(default, {**content, "workdir": str(workdir)})
    except (StorageError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{directory.config} does not hold the settings of a job ({error}); name"
            " the --workdir of one."
        ) from error
