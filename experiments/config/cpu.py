"""The named experiments that a CPU can do: every setting of a run, in one place."""

import dataclasses

from experiments.config.registry import experiment
from experiments.config.schema import (
    Config,
    FineTuneTuning,
    Saving,
    Tuning,
    override,
)
from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FashionMnist
from experiments.data.shakespeare import Shakespeare
from experiments.models.convnet import ConvNet
from experiments.models.from_nnx import NnxConvNet
from experiments.models.transformer import Transformer
from experiments.training.any_budget import AnyBudget
from experiments.training.optimizer import Optimizer
from experiments.training.protocols import FineTune, SideBySide

# One training run, and its averages.
_AVERAGES = (
    *("ema:0.99", "ema:0.995", "ema:0.999"),
    *("power:0.05", "power:0.1", "power:0.2", "posthoc:0.075", "posthoc:0.15"),
    *("lawa:5", "swag:30"),
)

_DIGITS = Config(
    data=Digits(batch_size=32, eval_batch_size=224),
    model=ConvNet(widths=(16, 32, 32), strides=(1, 2, 1)),
    optimizer=Optimizer(learning_rate=0.4, weight_decay=5e-4),
    protocol=SideBySide(epochs=40, swa_epochs=(5, 10), swa_lr=0.2, averages=_AVERAGES),
    seeds=5,
)
_DIGITS_TUNING = Tuning(tune_seeds=5, tune_learning_rates=(0.1, 0.2, 0.4))

experiment(
    "digits",
    _DIGITS,
    _DIGITS_TUNING,
    """SGD and SWA on scikit-learn's 1,797 digits; about two minutes on 2 CPU cores.

Command: python -m experiments digits
Expected test accuracy (601 images, so one is 0.17 %): docs/results/digits.
Run time: about two minutes on 2 CPU cores.
Rates and weight decay: python -m experiments tune digits
""",
)
experiment(
    "digits_nnx",
    dataclasses.replace(_DIGITS, model=NnxConvNet((16, 32, 32), (1, 2, 1))),
    _DIGITS_TUNING,
    """The same network written with Flax's nnx API, to show that both work.

Command: python -m experiments digits_nnx
Expected: as `digits`, whose rates it shares.
Run time: about two minutes on 2 CPU cores.
""",
)

_FASHION_MNIST = dataclasses.replace(
    _DIGITS,
    data=FashionMnist(batch_size=64, eval_batch_size=500),
    model=ConvNet(widths=(16, 32, 32), strides=(2, 2, 1)),
    optimizer=Optimizer(learning_rate=0.8, weight_decay=5e-4),
)
_FASHION_MNIST_TUNING = Tuning(tune_seeds=3)

experiment(
    "fashion_mnist",
    _FASHION_MNIST,
    _FASHION_MNIST_TUNING,
    """SGD and SWA on Fashion-MNIST; --train-examples 5000 shows the effect sooner.

Command: python -m experiments fashion_mnist --train-examples 5000
Expected test accuracy of that: docs/results/fashion_mnist.
Run time: 18 minutes on 2 CPU cores with two other jobs on them. Without
--train-examples it trains on 50,000 images (10,000 more validate), and an epoch costs
ten times as much.
Rates and weight decay: python -m experiments tune fashion_mnist, likewise
""",
)

_5000_IMAGES = override(_FASHION_MNIST, train_examples=5000)
_FINE_TUNE_5000 = dataclasses.replace(
    _5000_IMAGES,
    protocol=FineTune(
        epochs=30,
        swa_epochs=(5, 10),
        swa_lr=0.05,
        control_lr=0.001,
        averages=_AVERAGES,
    ),
)

experiment(
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
Run time: 22 minutes on 2 CPU cores with two other jobs on them.
Rates and weight decay: python -m experiments tune fashion_mnist_5000
""",
)
experiment(
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


def _noisy_labels(name: str, noise: float, **rates: float) -> None:
    experiment(
        name,
        override(
            _5000_IMAGES,
            validation_examples=5000,
            label_noise=noise,
            swa_epochs=(10,),
            early_stopping=True,
            width_plot=False,
            seeds=10,
            **rates,
        ),
        Tuning(
            tune_seeds=3,
            tune_learning_rates=(0.2, 0.4, 0.8),
            tune_weight_decays=(5e-4, 2e-3),
            tune_swa_lrs=(0.1, 0.2, 0.4),
        ),
        f"""Fashion-MNIST with {noise:.0%} of 5,000 training labels drawn at random.

SGD to its end and stopped early, against the averages of one run.

Command: python -m experiments {name}
Expected: docs/results/{name}.
Run time: 17 minutes on one CPU core.
Rates and weight decay: python -m experiments tune {name}
""",
    )


_noisy_labels("noisy_labels", 0.4, learning_rate=0.4, weight_decay=2e-3, swa_lr=0.05)
_noisy_labels("noisy_labels_20", 0.2, learning_rate=0.4, weight_decay=2e-3, swa_lr=0.05)
_noisy_labels("noisy_labels_0", 0.0, learning_rate=0.8, weight_decay=5e-4, swa_lr=0.1)

_BUDGETS = AnyBudget(
    epochs=60,
    read_at=(5, 10, 15, 20, 30, 40, 60),
    peaks=(0.4, 0.4, 0.8, 0.8, 0.8, 0.4, 0.8),
    swa_lr=0.2,
    averages=("ema:0.99", "ema:0.997", "power:0.1"),
)
_ANY_BUDGET = dataclasses.replace(
    _5000_IMAGES, protocol=_BUDGETS, saving=Saving(width_plot=False)
)
experiment(
    "any_budget",
    _ANY_BUDGET,
    Tuning(
        tune_learning_rates=(0.4, 0.8),
        tune_weight_decays=(5e-4,),
        tune_swa_lrs=(0.1, 0.2, 0.4),
    ),
    """One run at a constant rate, read at any moment, against a run for each budget.

Command: python -m experiments any_budget
Expected: docs/results/any_budget.
Run time: 16 minutes on 2 CPU cores.
Rates, with the weight decay of noisy_labels_0: python -m experiments tune any_budget
""",
)

_SHAKESPEARE = Config(
    data=Shakespeare(
        train_examples=4000, batch_size=32, eval_batch_size=200, context=64
    ),
    model=Transformer(layers=2, heads=4, width=64),
    optimizer=Optimizer(optimizer="adamw", learning_rate=8e-3, weight_decay=1.6),
    protocol=FineTune(
        epochs=15,
        swa_epochs=(5, 10),
        swa_lr=2.5e-4,
        control_lr=1e-4,
        averages=_AVERAGES,
    ),
    seeds=5,
)
experiment(
    "shakespeare",
    _SHAKESPEARE,
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

experiment(
    "any_budget_60000",
    override(
        _ANY_BUDGET,
        train_examples=None,
        hold_out=False,
        batch_size=256,
        max_shift=2,
        flip=True,
        learning_rate=0.4,
        weight_decay=1.25e-4,
        epochs=40,
        read_at=(5, 10, 20, 40),
        peaks=(1.6, 1.6, 0.8, 0.4),
        seeds=3,
        checkpoint_every=5000,
    ),
    Tuning(
        tune_learning_rates=(0.2, 0.4, 0.8),
        tune_weight_decays=(1.25e-4,),
        tune_swa_lrs=(0.1, 0.2, 0.4),
    ),
    """`any_budget` on all of Fashion-MNIST, shifted and mirrored, with batches of 256.

Command: python -m experiments any_budget_60000
Expected: docs/results/any_budget_60000. A run for each budget is better here.
Run time: 80 minutes on one CPU core.
Rates, with the weight decay of fashion_mnist_60000:
python -m experiments tune any_budget_60000
""",
)
experiment(
    "any_budget_shakespeare",
    dataclasses.replace(
        _SHAKESPEARE,
        protocol=dataclasses.replace(
            _BUDGETS,
            epochs=20,
            read_at=(5, 10, 20),
            peaks=(2e-3, 8e-3, 8e-3),
            swa_lr=2e-3,
        ),
        seeds=3,
        saving=Saving(checkpoint_every=5000, width_plot=False),
    ),
    Tuning(
        tune_learning_rates=(4e-3, 8e-3),
        tune_weight_decays=(1.6,),
        tune_swa_lrs=(1e-3, 2e-3, 4e-3),
    ),
    """`any_budget` for the language model of `shakespeare`, with AdamW.

Command: python -m experiments any_budget_shakespeare
Expected: docs/results/any_budget_shakespeare. A run for each budget is better here.
Run time: 40 minutes on 2 CPU cores, as `--share 1 2` beside `--share 2 2`.
Rates, with the weight decay of `shakespeare`:
python -m experiments tune any_budget_shakespeare
""",
)
