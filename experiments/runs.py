"""One run: an arm trained with one seed, scored, saved, and resumed if it stopped."""

import itertools
import json
import pathlib
from typing import Any, NamedTuple

import jax

from experiments import data, processes
from experiments.checkpoints import Store
from experiments.errors import StoppedError, StorageError
from experiments.evaluate import (
    Evaluation,
    averaged_network,
    averaged_variables,
    evaluate,
)
from experiments.files import write_json
from experiments.metrics import Log
from experiments.networks import make_model
from experiments.plans import Arm, Weights
from experiments.preemption import Stopper
from experiments.progress import Bar
from experiments.results import Score
from experiments.settings import Config
from experiments.train import (
    CompiledArm,
    EpochReport,
    Hooks,
    Snapshot,
    TrainState,
    train,
)

# Training examples behind `train_loss`: enough to tell whether a network overfits.
TRAIN_SCORE_EXAMPLES = 10_000

Scores = dict[str, Score]  # by the readout's label


class Outputs(NamedTuple):
    """What a job shares among its runs."""

    scorer: "Scorer"
    log: Log
    bar: Bar
    stopper: Stopper


def run_name(arm: str, seed: int) -> str:
    """Of a run's directory."""
    return f"{arm}-seed{seed}"


def run_directory(config: Config, arm: str, seed: int) -> pathlib.Path:
    """Where a run keeps its checkpoints and its scores."""
    return config.workdir / "runs" / run_name(arm, seed)


def make_store(config: Config, arm: str, seed: int) -> Store:
    """A run's checkpoints."""
    directory = run_directory(config, arm, seed) / "checkpoints"
    return Store(directory, config.keep_checkpoints)


def abstract_state(compiled: CompiledArm) -> TrainState:
    """Shapes and dtypes of the arm's state, as a checkpoint has them."""
    return jax.eval_shape(compiled.init, jax.random.key(0))


def final_state(config: Config, compiled: CompiledArm, seed: int) -> TrainState:
    """What a finished run ended with, from its newest checkpoint."""
    store = make_store(config, compiled.arm.name, seed)
    try:
        return store.restore(abstract_state(compiled))[1]
    finally:
        store.close()


def finished_scores(config: Config, arm: Arm, seed: int) -> Scores | None:
    """The scores of a run that is complete; None for any other.

    Raises:
        StorageError: Its finished.json is damaged.
    """
    path = run_directory(config, arm.name, seed) / "finished.json"

    def read() -> dict[str, Any]:
        if not path.is_file():
            return {"scores": None}
        try:
            scores = json.loads(path.read_text())["scores"]
            _scores(scores)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return {"damage": f"{type(error).__name__}: {error}"}
        return {"scores": scores}

    found = processes.from_main(read)
    if "damage" in found:
        raise StorageError(
            f"{path} is damaged ({found['damage']}). Delete it; the same command then"
            " writes it anew, from the run's last checkpoint."
        )
    scores = found["scores"]
    if scores is None or not {r.label for r in arm.readouts} <= set(scores):
        return None
    return _scores(scores)


def _scores(content: dict[str, Any]) -> Scores:
    return {label: Score(**score) for label, score in content.items()}


class Scorer:
    """Scores networks on the test split, and on a part of the train split."""

    def __init__(self, config: Config, splits: dict[str, data.Split]) -> None:
        size = config.eval_batch_size
        self.model = make_model(config, splits["train"])
        self._test = data.EvalBatches(splits["test"], size)
        self._train = data.EvalBatches(splits["train"], size)
        self._train_batches = -(-TRAIN_SCORE_EXAMPLES // size)
        self._inputs = data.InputBatches(splits["train"], size)

    def network(self, state: TrainState, weights: Weights) -> tuple[Any, Any]:
        """The parameters and statistics to score."""
        if weights == "iterate":
            return state.params, state.batch_stats
        if weights == "average":
            return averaged_network(self.model, state, self._inputs)
        params, along = averaged_variables(state)
        left = weights == "average, no BatchNorm pass"
        return params, state.batch_stats if left else along

    def test(self, network: tuple[Any, Any]) -> Evaluation:
        """Score on the whole test split."""
        return evaluate(self.model, *network, self._test)

    def train_loss(self, network: tuple[Any, Any]) -> float:
        """Loss on the first training examples, not augmented."""
        batches = itertools.islice(self._train, self._train_batches)
        return evaluate(self.model, *network, batches).loss


class _RunHooks(Hooks):
    """Logs, shows, scores and saves a run."""

    def __init__(
        self,
        config: Config,
        compiled: CompiledArm,
        seed: int,
        store: Store,
        outputs: Outputs,
    ) -> None:
        self._config, self._compiled, self._seed = config, compiled, seed
        self._store, self._outputs = store, outputs
        self._stopping = False
        self.scores: Scores = {}

    def _write(self, event: str, **values: Any) -> None:
        self._outputs.log.write(
            event, arm=self._compiled.arm.name, seed=self._seed, **values
        )

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        self._outputs.bar.step(step, loss, learning_rate)
        if step % self._config.log_every == 0 or step == 1:
            self._write("step", step=step, loss=loss, learning_rate=learning_rate)

    def on_report(self, report: EpochReport) -> None:
        self._write("train", **report._asdict())

    def on_epoch_end(self, epoch: int, state: TrainState) -> None:
        arm, scorer = self._compiled.arm, self._outputs.scorer
        readouts = [r for r in arm.readouts if r.epoch == epoch]
        wanted: list[Weights] = [r.weights for r in readouts]
        if self._seed == 0:  # for the curves
            wanted += ["iterate"]
            wanted += ["average"] if arm.averages_at(epoch) else []
        for weights in dict.fromkeys(wanted):
            network = scorer.network(state, weights)
            score = scorer.test(network)
            if weights in ("iterate", "average"):
                self._write("test", epoch=epoch, weights=weights, **score._asdict())
            for readout in readouts:
                if readout.weights == weights:
                    train_loss = scorer.train_loss(network)
                    self.scores[readout.label] = Score(*score, train_loss)

    def saves_after(self, step: int) -> bool:
        self._stopping = self._outputs.stopper.requested()
        last = step == self._compiled.steps
        return self._stopping or last or step % self._config.checkpoint_every == 0

    def on_snapshot(self, snapshot: Snapshot) -> None:
        scores = {label: score._asdict() for label, score in self.scores.items()}
        extra = {"metrics": snapshot.metrics, "scores": scores}
        self._store.save(snapshot.step, snapshot.state, extra)
        if self._stopping:
            self._store.wait()
            raise StoppedError(
                f"stopped at step {snapshot.step} of {self._compiled.steps} in run"
                f" {run_name(self._compiled.arm.name, self._seed)}; saved. The same"
                " command goes on from there.",
                self._outputs.stopper.signum,
            )


def execute(
    config: Config,
    compiled: CompiledArm,
    seed: int,
    split: data.Split,
    outputs: Outputs,
    parent: CompiledArm | None,
) -> Scores:
    """Train, score and save one run, or what is left of it.

    Args:
        config: The experiment.
        compiled: The arm.
        seed: Of weights and data order.
        split: The train split.
        outputs: The job's.
        parent: The arm whose final state the run starts from.

    Raises:
        FloatingPointError: Training diverged; the message names the step, the learning
            rate and the last good checkpoint.
        StoppedError: SIGTERM or Ctrl-C came; the run is saved.
        StorageError: A checkpoint cannot be written or read.
    """
    arm = compiled.arm
    with make_store(config, arm.name, seed) as store:
        hooks = _RunHooks(config, compiled, seed, store, outputs)
        resume = start = None
        if store.latest() is not None:
            step, state, extra = store.restore(abstract_state(compiled))
            hooks.scores = _scores(extra["scores"])
            metrics = [(loss, accuracy) for loss, accuracy in extra["metrics"]]
            resume = Snapshot(step, state, metrics)
            outputs.log.write("resumed", arm=arm.name, seed=seed, step=step)
        elif parent is not None:
            start = final_state(config, parent, seed)
        outputs.bar.start_run(
            f"{arm.name} seed {seed}",
            arm.epochs - arm.first_epoch,
            compiled.steps_per_epoch,
            resume.step if resume else 0,
        )
        try:
            train(config, compiled, seed, split, hooks, start=start, resume=resume)
        except FloatingPointError as error:
            store.wait()
            raise FloatingPointError(f"{error} {_last_good(store)}") from None
        store.wait()
    content = {label: score._asdict() for label, score in hooks.scores.items()}
    path = run_directory(config, arm.name, seed) / "finished.json"
    write_json(path, {"step": compiled.steps, "scores": content})
    outputs.log.write("finished", arm=arm.name, seed=seed)
    outputs.bar.finish_run()
    return hooks.scores


def _last_good(store: Store) -> str:
    step = store.latest()
    if step is None:
        return "There is no checkpoint of this run yet."
    return f"The last good checkpoint is step {step}, in {store.directory}."
