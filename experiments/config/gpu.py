"""The named experiments that want an accelerator."""

from experiments.config.registry import experiment
from experiments.config.schema import (
    Config,
    FineTuneTuning,
    Saving,
    Tuning,
    override,
)
from experiments.data.cifar import Cifar10, Cifar100
from experiments.data.fashion_mnist import FashionMnist
from experiments.data.imagenet import ImageNet
from experiments.models import Model
from experiments.models.preresnet import PreResNet
from experiments.models.resnet import STAGES, ResNet
from experiments.models.vgg import VGG16
from experiments.models.wide_resnet import WideResNet
from experiments.training.optimizer import Optimizer
from experiments.training.protocols import Budgets, FineTune, SideBySide


# The published networks on data that are here, narrower or less deep. SGD's rates are
# tuned; swa_lr is the smallest that was tried, and only for one of the four.
def _on_a_gpu(name: str, model: Model, noise: float, **rates: float) -> None:
    config = Config(
        data=FashionMnist(
            batch_size=128,
            eval_batch_size=1000,
            max_shift=2,
            flip=True,
            label_noise=noise,
        ),
        model=model,
        optimizer=Optimizer(learning_rate=0.1, weight_decay=5e-4, decay_all=True),
        protocol=SideBySide(
            epochs=10,
            swa_epochs=(3,),
            swa_lr=0.025,
            averages=("ema:0.99", "ema:0.999", "power:0.05", "power:0.1", "lawa:3"),
            early_stopping=True,
        ),
        seeds=3,
        saving=Saving(checkpoint_every=5000, width_plot=False),
    )
    experiment(
        name,
        override(config, **rates),
        Tuning(tune_weight_decays=(5e-4,)),
        f"""{type(model).__name__} on Fashion-MNIST, {noise:.0%} of its labels random.

Command: python -m experiments {name}
Expected: not recorded yet; docs/tunings has the search for SGD's rate.
Run time: not measured.
Rates: python -m experiments tune {name}
""",
    )


_PRERESNET = PreResNet(20, dtype="bfloat16")
_WIDE_RESNET = WideResNet(16, 2, dtype="bfloat16")
_on_a_gpu("fashion_mnist_preresnet", _PRERESNET, 0.0)
_on_a_gpu("fashion_mnist_preresnet_noisy", _PRERESNET, 0.4)
_on_a_gpu("fashion_mnist_wide_resnet", _WIDE_RESNET, 0.0, learning_rate=0.2)
_on_a_gpu("fashion_mnist_wide_resnet_noisy", _WIDE_RESNET, 0.4)


# The original repository's settings: github.com/timgaripov/swa, README.md at commit
# 411b2fc and train.py. Its SGD schedule moves once an epoch, ours at every step.
_CIFAR_NETWORKS = {
    "vgg16": VGG16(False),
    "vgg16_bn": VGG16(True),
    "preresnet110": PreResNet(110),
    "preresnet164": PreResNet(164),
    "wide_resnet": WideResNet(),
}


def _cifar(dataset: type[Cifar10], network: str, model: Model) -> None:
    classes = 10 if dataset is Cifar10 else 100
    name = f"cifar{classes}_{network}"
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
    trained = sum(int(budget * epochs) for budget in (1, 1.25, 1.5, 1.5))
    experiment(
        name,
        config,
        Tuning(),
        f"""{network} on CIFAR-{classes} as in the original repository.

Command: python -m experiments {name}
Expected: docs/results.md has what is published, which vgg16_bn is not.
Run time: not measured; {trained:,} epochs of 50,000 images a seed want an accelerator.
""",
    )


for _dataset in (Cifar10, Cifar100):
    for _network, _model in _CIFAR_NETWORKS.items():
        if (_dataset, _network) != (Cifar100, "vgg16_bn"):
            _cifar(_dataset, _network, _model)


# The baseline's settings are those of Goyal et al., arXiv:1706.02677, for batches of
# 256, with a cosine; the rates of the last two are ours and have not been tried.
def _imagenet(depth: int) -> None:
    name = f"imagenet_resnet{depth}"
    config = Config(
        data=ImageNet(hold_out=False, batch_size=256, eval_batch_size=500, flip=True),
        model=ResNet(stages=STAGES[depth], dtype="bfloat16"),
        optimizer=Optimizer(learning_rate=0.1, weight_decay=1e-4),
        protocol=FineTune(epochs=90, swa_epochs=(5, 10), swa_lr=0.01, control_lr=0.001),
        seeds=3,
        saving=Saving(checkpoint_every=1000, width_plot=False),
    )
    experiment(
        name,
        config,
        FineTuneTuning(),
        f"""ResNet-{depth} on ImageNet: 5 and 10 SWA epochs on a converged model.

Command: python -m experiments {name} --parallel jit
Expected: docs/results.md has what is published.
Run time: not measured; 305 epochs of 1.28 million images a seed, equal-budget
baselines and control included.
""",
    )


_imagenet(50)
_imagenet(152)
