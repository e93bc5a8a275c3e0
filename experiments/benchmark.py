"""What averaging costs: `python -m experiments.benchmark`.

Everything is a ratio of two measurements taken in turns in this one run, so that what
else the machine does hits both alike. Each line gives the median over rounds and, as
spread, the first and third quartile. Nothing here is asserted: see tests for that.

PyTorch and optax-swag are compared where they are installed (extra `benchmark`).
`--only p` says instead where the time of `update_average` goes.
"""

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
import tyro
from flax import linen as nn

import swa_jax
from experiments.files import write_json
from experiments.models import STAGES, ResNet

PyTree = Any
Action = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure, and what."""

    rounds: int = 15
    """Times that each pair is measured, at least 2."""

    batch_size: int = 32
    """Images in a step of ResNet-50."""

    image_size: int = 64
    """Their height and width."""

    only: tuple[Literal["a", "b", "c", "d", "e", "f", "p"], ...] = ()
    """Sections to run, by letter. Empty: all but p, the profile."""

    output: pathlib.Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One measured ratio."""

    section: str
    what: str
    ratio: float
    low: float  # first quartile
    high: float  # third quartile
    target: str
    note: str = ""


# A finished OpenMP loop of the C code or of PyTorch would otherwise keep its threads
# spinning into the next turn, at the expense of whoever comes next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def take_turns(actions: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Time every action once a round, in an order that changes; seconds by name."""
    for action in actions.values():  # compile, warm the caches
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name in in_turn(actions, number):
            start = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of a round: another one comes first each time."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(
    section: str,
    what: str,
    pair: tuple[Sequence[float], Sequence[float]],
    target: str,
    note: str = "",
) -> Line:
    """The ratio of two lists of seconds, round by round."""
    ratios = [a / b for a, b in zip(*pair, strict=True)]
    low, middle, high = quartiles(ratios)
    return Line(section, what, middle, low, high, target, note)


def in_milliseconds(
    section: str, what: str, seconds: Sequence[float], target: str
) -> Line:
    """A time that is compared with nothing."""
    low, middle, high = (1e3 * x for x in quartiles(seconds))
    return Line(section, f"{what}, in ms", middle, low, high, target)


# (a) and (e): a training step with and without averaging.


@dataclasses.dataclass
class Training:
    """A donated training step of ResNet-50 and the state that it goes round with."""

    options: Options
    optimizer: optax.GradientTransformationExtraArgs

    def __post_init__(self) -> None:
        """Create parameters and data; compile nothing yet."""
        side = self.options.image_size
        rng = np.random.default_rng(0)
        self.model = ResNet(STAGES["resnet50"])
        self.images = jnp.asarray(
            rng.normal(size=(self.options.batch_size, side, side, 3)), jnp.float32
        )
        self.labels = jnp.asarray(rng.integers(0, 1000, self.options.batch_size))
        variables = jax.jit(functools.partial(self.model.init, train=False))(
            jax.random.key(0), self.images[:1]
        )
        params = variables["params"]
        self.state = params, variables["batch_stats"], self.optimizer.init(params)
        self.jitted = jax.jit(self.step, donate_argnums=0)

    def step(self, state: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
        """One update."""
        params, batch_stats, opt_state = state

        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    def run(self) -> None:
        """One update, waited for."""
        self.state = self.jitted(self.state, self.images, self.labels)
        jax.block_until_ready(self.state)

    def compile_seconds(self) -> float:
        """Compile the step from nothing."""
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(self.step, donate_argnums=0).lower(
            self.state, self.images, self.labels
        ).compile()
        return time.perf_counter() - start


def _sgd(*links: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.sgd(1e-4, momentum=0.9), *links)


def training_steps(options: Options) -> Iterator[Line]:
    """(a) Steps that average, and steps that do not yet."""
    arms = {
        "plain": Training(options, _sgd()),
        "sampled": Training(options, _sgd(swa_jax.swa())),
        "skipped": Training(options, _sgd(swa_jax.swa(start_step=10**9))),
    }
    seconds = take_turns({k: arm.run for k, arm in arms.items()}, options.rounds)
    milliseconds = 1e3 * statistics.median(seconds["plain"])
    note = f"step without swa(): {milliseconds:.0f} ms"
    for name, target in (("sampled", ""), ("skipped", "at most 1.02")):
        pair = seconds[name], seconds["plain"]
        yield compare("a", f"ResNet-50 step with swa(), {name}", pair, target, note)


def compile_time(options: Options) -> Iterator[Line]:
    """(e) Compiling the step with averaging in it."""
    arms = {
        "averaging": Training(options, _sgd(swa_jax.swa())),
        "plain": Training(options, _sgd()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(max(2, options.rounds // 2)):
        for name in in_turn(arms, number):
            seconds[name].append(arms[name].compile_seconds())
    what = "compiling the ResNet-50 step with swa()"
    note = f"without: {statistics.median(seconds['plain']):.1f} s"
    pair = seconds["averaging"], seconds["plain"]
    yield compare("e", what, pair, "at most 1.05", note)


# (b) and (c): the averaging alone, on ResNet-50's parameters.


@functools.cache
def resnet50_params() -> PyTree:
    """ResNet-50's parameters: 161 leaves, 25,557,032 float32 values."""
    model = ResNet(STAGES["resnet50"])
    init = jax.jit(functools.partial(model.init, train=False))
    return init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]


class Averaging:
    """`update_average` on a tree, called again and again.

    With `jitted` inside a `jax.jit`, so that no Python of it runs.
    """

    def __init__(self, params: PyTree, *, jitted: bool = False) -> None:
        self.params = params
        self.state = swa_jax.init_average(params)
        self.update = swa_jax.update_average
        if jitted:
            self.update = jax.jit(swa_jax.update_average, donate_argnums=0)

    def run(self) -> None:
        """One average, waited for."""
        self.state = self.update(self.state, self.params)
        jax.block_until_ready(self.state)


_TRIAD = r"""
#include <stddef.h>
void average(float *restrict mean, const float *restrict new, float weight, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) mean[i] += (new[i] - mean[i]) * weight;
}
"""


def c_average(size: int) -> Action | None:
    """The same arithmetic over one array of `size` floats, in C.

    None without a C compiler that knows OpenMP.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "average.c")
        source.write_text(_TRIAD)
        library = source.with_suffix(".so")
        flags = ["-O3", "-march=native", "-fopenmp", "-ffast-math", "-shared", "-fPIC"]
        command = [compiler, *flags, "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).average
        except (subprocess.CalledProcessError, OSError):
            return None  # no OpenMP, or its library is missing
    floats = np.ctypeslib.ndpointer(np.float32, flags="C")
    function.argtypes = [floats, floats, ctypes.c_float, ctypes.c_size_t]
    function.restype = None
    mean, new = np.zeros(size, np.float32), np.ones(size, np.float32)
    return lambda: function(mean, new, 0.5, size)


def plain_loop(size: int) -> tuple[Action, str]:
    """The fastest average of one array that is at hand, and what it is."""
    in_c = c_average(size)
    if in_c is not None:
        return in_c, "C, OpenMP"
    mean, new = np.zeros(size, np.float32), np.ones(size, np.float32)
    return lambda: np.add(mean, new, out=mean), "NumPy"


def bandwidth(options: Options) -> Iterator[Line]:
    """(b) Bytes a second of `update_average` against a plain loop."""
    params = resnet50_params()
    size = sum(x.size for x in jax.tree.leaves(params))
    reference, name = plain_loop(size)
    ours = Averaging(params)
    seconds = take_turns({"ours": ours.run, "c": reference}, 3 * options.rounds)
    # Both read the mean and the weights and write the mean: 12 bytes a value. A ratio
    # of bandwidths is the inverse one of times.
    speed = 12e-9 * size / statistics.median(seconds["ours"])
    pair = seconds["c"], seconds["ours"]
    what = f"bandwidth of update_average over {name}"
    yield compare("b", what, pair, "at least 0.9", f"{speed:.1f} GB/s")


def peers(options: Options) -> Iterator[Line]:
    """(c) Time of the others for the same, over ours: above 1 is ahead."""
    params = resnet50_params()
    torch_average = _torch_average(params)
    if torch_average is not None:
        name, update = torch_average
        actions = {"ours": Averaging(params).run, "theirs": update}
        seconds = take_turns(actions, 3 * options.rounds)
        note = f"update_average: {1e3 * statistics.median(seconds['ours']):.1f} ms"
        pair = seconds["theirs"], seconds["ours"]
        yield compare("c", f"time of {name} over ours", pair, "above 1", note)
    optax_swag = _optax_swag()
    if optax_swag is not None:
        actions = {
            "ours": OptimizerStep(params, swa_jax.swa()).run,
            "theirs": OptimizerStep(params, optax_swag).run,
        }
        seconds = take_turns(actions, 3 * options.rounds)
        note = f"sgd and swa(): {1e3 * statistics.median(seconds['ours']):.1f} ms"
        pair = seconds["theirs"], seconds["ours"]
        what = "time of an optimizer step with optax-swag's swa over ours"
        yield compare("c", what, pair, "above 1", note)


class OptimizerStep:
    """SGD's step with an average, state and parameters donated, without a network."""

    def __init__(self, params: PyTree, average: Any) -> None:
        tx = _sgd(average)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: PyTree, grads: PyTree) -> PyTree:
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self.grads = jax.tree.map(jnp.zeros_like, params)
        self.step = step
        # Copies: optax-swag's init returns the parameters themselves.
        self.state = jax.tree.map(jnp.copy, (params, tx.init(params)))

    def run(self) -> None:
        """One step, waited for."""
        self.state = self.step(self.state, self.grads)
        jax.block_until_ready(self.state)


def _torch_average(params: PyTree) -> tuple[str, Action] | None:
    try:
        import torch
        from torch.optim.swa_utils import AveragedModel
    except ImportError:
        return None
    torch.set_num_threads(jax_threads())
    model = torch.nn.Module()
    for number, leaf in enumerate(jax.tree.leaves(params)):
        weight = torch.nn.Parameter(torch.from_numpy(np.array(leaf)))
        model.register_parameter(f"p{number}", weight)
    average = AveragedModel(model)
    name = f"PyTorch {torch.__version__} AveragedModel.update_parameters"
    return name, lambda: average.update_parameters(model)


def _optax_swag() -> Any:
    try:
        import optax_swag
    except ImportError:
        return None
    return optax_swag.swa(freq=1)


def jax_threads() -> int:
    """Threads that JAX computes with on a CPU: one a core."""
    return len(os.sched_getaffinity(0))


# (d): the BatchNorm pass.


class Convolutions(nn.Module):
    """Three strided convolutions, each with BatchNorm and ReLU."""

    widths: tuple[int, ...] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """From images to features."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=2, padding=1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x


def forward_passes(model: nn.Module, batches: list[jax.Array]) -> dict[str, Action]:
    """All batches through a network: for statistics, in training, in inference."""
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), batches[0][:1]
    )
    params, batch_stats = variables["params"], variables["batch_stats"]

    def in_training(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    def batch_stats_fn(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> PyTree:
        return in_training(params, batch_stats, batch)[1]["batch_stats"]

    training = jax.jit(in_training)

    @jax.jit
    def inference(params: PyTree, batch_stats: PyTree, batch: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, batch, train=False)

    def train_all() -> None:
        stats = batch_stats
        for batch in batches:  # running statistics go from batch to batch
            logits, updated = training(params, stats, batch)
            stats = updated["batch_stats"]
        jax.block_until_ready((logits, stats))

    return {
        "pass": lambda: jax.block_until_ready(
            swa_jax.recompute_batch_stats(batch_stats_fn, params, batch_stats, batches)
        ),
        "training": train_all,
        "inference": lambda: jax.block_until_ready(
            [inference(params, batch_stats, batch) for batch in batches]
        ),
    }


def random_batches(options: Options, count: int, size: int) -> list[jax.Array]:
    """Batches of `size` images that are noise."""
    side = options.image_size
    noise = np.random.default_rng(0).normal(size=(count, size, side, side, 3))
    return list(jnp.asarray(noise, jnp.float32))


def batch_norm_pass(options: Options) -> Iterator[Line]:
    """(d) The pass against forward passes over the same batches, an image each."""
    # Many small batches: what the pass does only in the first must not count much.
    batches = random_batches(options, 40, max(1, options.batch_size // 4))
    actions = forward_passes(ResNet(STAGES["resnet50"]), batches)
    seconds = take_turns(actions, max(3, options.rounds // 3))
    images = sum(map(len, batches))
    milliseconds = 1e3 * statistics.median(seconds["pass"]) / images
    note = f"pass: {milliseconds:.2f} ms an image, {len(batches)} batches"
    for other, target in (("training", "at most 1.1"), ("inference", "")):
        pair = seconds["pass"], seconds[other]
        what = f"BatchNorm pass over {other}-mode forward pass, ResNet-50"
        yield compare("d", what, pair, target, note)
    batches = random_batches(options, 12, options.batch_size)
    actions = forward_passes(Convolutions(), batches)
    del actions["training"]
    seconds = take_turns(actions, options.rounds)
    pair = seconds["pass"], seconds["inference"]
    what = "recompute_batch_stats over inference, 3 convolutions"
    yield compare("d", what, pair, "")
    yield from _torch_update_bn(options, [np.asarray(b) for b in batches])


def _torch_update_bn(options: Options, batches: list[np.ndarray]) -> Iterator[Line]:
    """PyTorch's own ratio, on the network of `Convolutions`."""
    try:
        import torch
        from torch.optim.swa_utils import update_bn
    except ImportError:
        return
    torch.set_num_threads(jax_threads())
    layers: list[Any] = []
    for before, after in itertools.pairwise((3, *Convolutions.widths)):
        layers += [
            torch.nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(after),
            torch.nn.ReLU(),
        ]
    model = torch.nn.Sequential(*layers)
    data = [torch.from_numpy(b.transpose(0, 3, 1, 2).copy()) for b in batches]

    def inference() -> None:
        model.eval()
        with torch.no_grad():
            for batch in data:
                model(batch)

    actions: dict[str, Action] = {
        "pass": lambda: update_bn(data, model),
        "inference": inference,
    }
    seconds = take_turns(actions, options.rounds)
    pair = seconds["pass"], seconds["inference"]
    what = "for comparison: PyTorch's update_bn over inference, 3 convolutions"
    yield compare("d", what, pair, "")


# (f): import time.


def import_time(options: Options) -> Iterator[Line]:
    """(f) `import swa_jax` where jax and optax are imported anyway."""
    # What importing jax left to collect takes 40 ms, and is not ours to pay.
    code = "import gc, time, jax, optax; gc.collect(); t = time.perf_counter(); {}"
    code += "; print(time.perf_counter() - t)"

    def seconds(statement: str) -> float:
        command = [sys.executable, "-c", code.format(statement)]
        return float(subprocess.check_output(command))

    extra = [seconds("import swa_jax") for _ in range(options.rounds)]
    what = "import swa_jax after jax and optax"
    yield in_milliseconds("f", what, extra, "under 50 ms")


# (p): where the time of update_average goes.


def profile(options: Options) -> Iterator[Line]:
    """(p) What stands between `update_average` and a plain loop, thing by thing."""
    params = resnet50_params()
    size = sum(x.size for x in jax.tree.leaves(params))
    reference, name = plain_loop(size)
    stages: dict[str, Bare | Averaging] = {
        "m + (q - m) * 0.5 on one array": Bare(jnp.ones(size)),
        "m + (q - m) * 0.5 on all arrays": Bare(params),
        "update_average's formula": Averaging(params, jitted=True),
        "update_average": Averaging(params),
    }
    actions = {what: stage.run for what, stage in stages.items()}
    seconds = take_turns({**actions, name: reference}, 3 * options.rounds)
    for what in stages:
        pair = seconds[name], seconds[what]
        yield compare("p", f"bandwidth of {what} over {name}", pair, "")
    tiny = jax.tree.map(lambda x: jnp.ones((1,)), params)
    calls = {"update_average": Averaging(tiny), "JAX": Averaging(tiny, jitted=True)}
    seconds = take_turns({k: x.run for k, x in calls.items()}, 10 * options.rounds)
    count = len(jax.tree.leaves(tiny))
    for what, times in seconds.items():
        yield in_milliseconds("p", f"a call on {count} tiny arrays, {what}", times, "")


class Bare:
    """Halfway to the parameters, again and again: no counter, no check."""

    def __init__(self, params: PyTree) -> None:
        self.params = params
        self.mean = jax.tree.map(jnp.zeros_like, params)

    def run(self) -> None:
        """One average, waited for."""
        self.mean = _halfway(self.mean, self.params)
        jax.block_until_ready(self.mean)


@functools.partial(jax.jit, donate_argnums=0)
def _halfway(mean: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(lambda m, q: m + (q - m) * 0.5, mean, params)


SECTIONS: dict[str, Callable[[Options], Iterator[Line]]] = {
    "a": training_steps,
    "b": bandwidth,
    "c": peers,
    "d": batch_norm_pass,
    "e": compile_time,
    "f": import_time,
    "p": profile,
}
#: What runs unless something else was asked for.
_USUAL = tuple(letter for letter in SECTIONS if letter != "p")


def machine() -> str:
    """This machine in a line."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return (
        f"{jax_threads()} cores of {model}, Python {platform.python_version()}, "
        f"jax {jax.__version__}, backend {jax.default_backend()}"
    )


def markdown(lines: Sequence[Line]) -> str:
    """The results as a table for the documentation."""
    rows = ["| | Ratio | Median | Quartiles | Target | |", "|---|---|---:|---|---|---|"]
    rows += [
        f"| {x.section} | {x.what} | {x.ratio:.3f} | {x.low:.3f} to {x.high:.3f} "
        f"| {x.target} | {x.note} |"
        for x in lines
    ]
    return "\n".join(rows) + "\n"


def main(options: Options) -> None:
    """Measure, print, and write what was asked for."""
    console = rich.console.Console()
    console.print(machine())
    lines = []
    for letter in options.only or _USUAL:
        for line in SECTIONS[letter](options):
            console.print(f"({letter}) {line.what}: {line.ratio:.3f}")
            lines.append(line)
    print(markdown(lines))
    if options.output is not None:
        content = {
            "machine": machine(),
            "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "lines": [dataclasses.asdict(line) for line in lines],
        }
        write_json(options.output, content)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m experiments.benchmark"))
