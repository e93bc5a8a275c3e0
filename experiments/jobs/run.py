"""One run: an arm trained with one seed, scored, saved, and resumed if it stopped."""

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import swa_jax
from experiments.config.schema import Saving
from experiments.jobs.snapshots import Snapshots
from experiments.runtime import processes
from experiments.runtime.errors import StoppedError, StorageError
from experiments.runtime.files import write_json
from experiments.runtime.metrics import Log
from experiments.runtime.progress import Bar
from experiments.runtime.signals import Stopper
from experiments.runtime.store import Store
from experiments.runtime.workdir import Run, Workdir
from experiments.training.loop import EpochReport, Hooks, Snapshot, train
from experiments.training.plans import Arm, Weights
from experiments.training.scoring import (
    Evaluation,
    Network,
    Scorer,
    averaged_variables,
)
from experiments.training.step import CompiledArm, TrainState

# Training examples behind `train_loss`: enough to tell whether a network overfits.
TRAIN_SCORE_EXAMPLES = 10_000


class Score(NamedTuple):
    """One network's scores."""

    accuracy: float  # on the test split, fraction in [0, 1]
    loss: float  # on the test split, in nats
    train_loss: float  # on the first training examples, not augmented, in nats
    ece: float | None = None  # on the test split; None in files of earlier versions
    # Where the weights were best on the validation split; None where they are the last.
    validation: float | None = None  # their accuracy there
    epoch: int | None = None


class Finished(NamedTuple):
    """What finished.json says of a run that is complete."""

    scores: dict[str, Score]  # by the readout's label
    seconds: float | None  # of work, over all its restarts


class Outputs(NamedTuple):
    """What a job shares among its runs."""

    directory: Workdir
    saving: Saving
    scorer: Scorer
    log: Log
    bar: Bar
    stopper: Stopper


def final_state(directory: Workdir, compiled: CompiledArm, seed: int) -> TrainState:
    """What a finished run ended with, from its newest checkpoint.

    Raises:
        StorageError: There is none, or it is damaged.
    """
    place = directory.run(compiled.arm.name, seed)
    with Store(place.checkpoints, keep=1) as store:
        return store.restore(compiled.abstract_state)[1]


def finished(directory: Workdir, arm: Arm, seed: int) -> Finished | None:
    """What a run that is complete found; None for any other.

    Raises:
        StorageError: Its finished.json is damaged.
    """
    path = directory.run(arm.name, seed).finished

    def read() -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            _scores(content["scores"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{path} is damaged ({type(error).__name__}: {error}). Delete it; the"
                " same command then writes it anew, from the run's last checkpoint."
            ) from error
        return content

    content = processes.from_main(read)
    if content is None or not {r.label for r in arm.readouts} <= set(content["scores"]):
        return None
    return Finished(_scores(content["scores"]), content.get("seconds"))


def _scores(content: dict[str, Any]) -> dict[str, Score]:
    return {label: Score(**score) for label, score in content.items()}


class _RunHooks(Hooks):
    """Logs, shows, scores and saves a run."""

    def __init__(
        self,
        compiled: CompiledArm,
        seed: int,
        run: Run,
        store: Store,
        outputs: Outputs,
    ) -> None:
        self._compiled, self._seed, self._run = compiled, seed, run
        self._store, self._outputs = store, outputs
        self._snapshots = Snapshots(run.snapshots, compiled.arm)
        self.scores: dict[str, Score] = {}
        self.seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def content(self) -> dict[str, Any]:
        """What finished.json has, and each checkpoint so far, in JSON's types."""
        return {
            "scores": {label: score._asdict() for label, score in self.scores.items()},
            "seconds": self.seconds_before + time.monotonic() - self._started,
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from what a checkpoint has."""
        self.scores = _scores(content["scores"])
        self.seconds_before = content.get("seconds", 0.0)

    def _write(self, event: str, **values: Any) -> None:
        arm = self._compiled.arm.name
        self._outputs.log.write(event, arm=arm, seed=self._seed, **values)

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        self._outputs.bar.step(step, loss, learning_rate)
        if step % self._outputs.saving.log_every == 0 or step == 1:
            self._write("step", step=step, batch_loss=loss, learning_rate=learning_rate)

    def on_report(self, report: EpochReport) -> None:
        self._write("train", **report._asdict())

    def on_epoch_end(self, epoch: int, step: int, state: TrainState) -> None:
        arm, scorer = self._compiled.arm, self._outputs.scorer
        if arm.averages_at(epoch):
            self._log_average(epoch, step, state)
        self._snapshots.keep(epoch, step, state)
        self._stop_early(epoch, state)
        readouts = [r for r in arm.readouts if r.epoch == epoch and not r.stopped_early]
        wanted: list[Weights] = [r.weights for r in readouts]
        if self._seed == 0:  # for the curves
            wanted += ["iterate"]
            wanted += ["average"] if arm.averages_at(epoch) else []
        for weights in dict.fromkeys(wanted):
            networks = self._networks(step, state, weights)
            score = scorer.score(networks, "test")
            if weights in ("iterate", "average"):
                self._write("test", epoch=epoch, weights=weights, **score._asdict())
            for readout in readouts:
                if readout.weights == weights:
                    self.scores[readout.label] = self._score(networks, score)

    def _networks(
        self, step: int, state: TrainState, weights: Weights
    ) -> list[Network]:
        """What a readout names, also where it is put together afterwards."""
        arm, scorer = self._compiled.arm, self._outputs.scorer
        for other in arm.others:
            if other.name == weights and other.make is None:
                params = self._snapshots.read(other, step, state.params)
                return [scorer.fitted(params, state.batch_stats)]
        return scorer.networks(arm, state, weights)

    def _score(self, networks: list[Network], test: Evaluation) -> Score:
        scorer = self._outputs.scorer
        train = scorer.score(networks, "train", TRAIN_SCORE_EXAMPLES)
        return Score(test.accuracy, test.loss, train.loss, test.ece)

    def _stop_early(self, epoch: int, state: TrainState) -> None:
        """Keep the scores of the epoch that is best on the validation split so far."""
        scorer = self._outputs.scorer
        for readout in self._compiled.arm.readouts:
            if not readout.stopped_early:
                continue
            weights, best = readout.weights, self.scores.get(readout.label)
            networks = scorer.networks(self._compiled.arm, state, weights)
            found = scorer.score(networks, "validation")
            values = found._asdict()
            self._write("validation", epoch=epoch, weights=weights, **values)
            if best is None or found.accuracy > (best.validation or 0.0):
                score = self._score(networks, scorer.score(networks, "test"))
                kept = score._replace(validation=found.accuracy, epoch=epoch)
                self.scores[readout.label] = kept

    def _log_average(self, epoch: int, step: int, state: TrainState) -> None:
        params, _ = averaged_variables(state)
        squares = jax.tree.map(
            lambda a, w: jnp.sum(jnp.square(a - w)), params, state.params
        )
        models = swa_jax.models_in_average(state.opt_state, swa_jax.SWAState)
        self._write(
            "average",
            epoch=epoch,
            step=step,
            num_averaged=int(models),
            distance=math.sqrt(sum(jax.tree.leaves(squares))),
        )

    def after_step(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        outputs, last = self._outputs, self._compiled.steps
        stopping = outputs.stopper.poll()
        if stopping or step == last or step % outputs.saving.checkpoint_every == 0:
            taken = snapshot()
            extra = {"metrics": taken.metrics, **self.content}
            self._store.save(taken.step, taken.state, extra)
        if stopping:
            self._store.wait()
            raise StoppedError(
                f"stopped at step {step} of {last} in run {self._run.name}; saved. The"
                " same command goes on from there.",
                outputs.stopper.signum,
            )


def execute(
    compiled: CompiledArm, seed: int, outputs: Outputs, parent: CompiledArm | None
) -> Finished:
    """Train, score and save one run, or what is left of it.

    Args:
        compiled: The arm.
        seed: Of weights and data order.
        outputs: The job's.
        parent: The arm whose final state the run starts from.

    Raises:
        FloatingPointError: Training diverged; the message names the step, the learning
            rate and the last good checkpoint.
        StoppedError: SIGTERM or Ctrl-C came; the run is saved.
        StorageError: A checkpoint cannot be written or read.
    """
    arm, directory = compiled.arm, outputs.directory
    run = directory.run(arm.name, seed)
    with Store(run.checkpoints, outputs.saving.keep_checkpoints) as store:
        hooks = _RunHooks(compiled, seed, run, store, outputs)
        resume = start = None
        if store.latest() is not None:
            step, state, extra = store.restore(compiled.abstract_state)
            hooks.restore(extra)
            metrics = [(loss, accuracy) for loss, accuracy in extra["metrics"]]
            resume = Snapshot(step, state, metrics)
            outputs.log.write("resumed", arm=arm.name, seed=seed, step=step)
        elif parent is not None:
            start = final_state(directory, parent, seed)
        outputs.bar.start_run(
            f"{arm.label}, seed {seed}",
            arm.epochs - arm.first_epoch,
            compiled.steps_per_epoch,
            resume.step if resume else 0,
        )
        try:
            train(compiled, seed, hooks, start=start, resume=resume)
        except FloatingPointError as error:
            store.wait()
            raise FloatingPointError(f"{error} {_last_good(store)}") from None
        store.wait()
    content = hooks.content
    write_json(run.finished, {"step": compiled.steps, **content})
    outputs.log.write("finished", arm=arm.name, seed=seed)
    outputs.bar.finish_run()
    return Finished(hooks.scores, content["seconds"])


def _last_good(store: Store) -> str:
    step = store.latest()
    if step is None:
        return "There is no checkpoint of this run yet."
    return f"The last good checkpoint is step {step}, in {store.directory}."
