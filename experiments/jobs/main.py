"""The main job: train every arm with every seed, and score them on the test split.

Here alone the whole configuration is seen; each room gets its part.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Mapping

import rich.console

from experiments.config.schema import FREE, Config, settings_of
from experiments.data.augment import own_share
from experiments.data.batches import TrainBatches
from experiments.data.splits import Split, load_splits
from experiments.jobs import results
from experiments.jobs.run import Finished, Outputs, execute, finished
from experiments.jobs.width import measure_width
from experiments.runtime import processes
from experiments.runtime.files import write_json
from experiments.runtime.metrics import Line, open_log
from experiments.runtime.progress import progress_bar
from experiments.runtime.provenance import provenance
from experiments.runtime.signals import stop_on_signal
from experiments.training.parallel import make_strategy
from experiments.training.plans import Arm, Plan
from experiments.training.scoring import Scorer
from experiments.training.step import CompiledArm, compile_arm

Runs = dict[tuple[str, int], Finished | None]  # by arm and seed


class Trainer:
    """Arms and scorers of a configuration on its data; nothing is trained yet."""

    def __init__(self, config: Config, splits: Mapping[str, Split]) -> None:
        """Compile for `splits`, "train" among them, and for this job's devices.

        Raises:
            DevicesError: The settings do not fit this job's devices.
        """
        self.config, self.splits = config, splits
        self.strategy = make_strategy(config.devices.parallel, config.data.batch_size)
        self.batches = TrainBatches(splits["train"], config.data, own_share())

    def compile(self, arm: Arm) -> CompiledArm:
        """An arm, compiled."""
        config = self.config
        return compile_arm(
            arm,
            config.model,
            config.data.inputs,
            config.optimizer,
            self.batches,
            self.strategy,
        )

    def scorer(self, limits: Mapping[str, int] | None = None) -> Scorer:
        """A scorer on the splits, or on their first examples."""
        size = self.config.data.eval_batch_size
        return Scorer(
            self.config.network, self.splits, size, self.strategy, limits or {}
        )


def train_and_evaluate(config: Config, console: rich.console.Console) -> bool:
    """Run the whole comparison; write its files into `config.workdir`.

    Runs that are finished are kept, and a run that was stopped goes on where it was.

    Args:
        config: The experiment.
        console: Shows the progress bar.

    Returns:
        Whether the results are written: not by a share of the job.

    Raises:
        DataUnavailableError: The data set cannot be had, or not as asked for.
        StorageError: The work directory belongs to other settings or another job, or
            cannot be written or read.
        StoppedError: SIGTERM or Ctrl-C came; everything is saved.
    """
    plan, directory = config.plan, config.directory
    with directory.locked(settings_of(config), FREE):
        complete = processes.from_main(directory.results.is_file)
        runs: Runs = {
            (arm.name, seed): finished(directory, arm, seed)
            for arm in plan
            for seed in range(config.seeds)
        }
        if complete and all(runs.values()):
            console.print(
                f"{config.workdir} holds a finished job. To start anew, delete it or"
                " give another --workdir.",
                soft_wrap=True,
            )
        else:
            started = time.monotonic()
            _run_all(config, plan, runs, console)
            seconds = time.monotonic() - started
            console.print(f"{seconds:.0f} s; see {config.workdir}", soft_wrap=True)
        part, parts = config.share
        if parts > 1:
            console.print(
                f"share {part} of {parts} is done; when all are, the same command"
                " without --share writes the results.",
                soft_wrap=True,
            )
            return False
        _write_results(config, plan, runs)
    return True


def share_of_runs(
    steps: Mapping[str, int],
    roots: Mapping[str, str],
    seeds: int,
    share: tuple[int, int],
) -> set[tuple[str, int]]:
    """Which runs, by arm and seed, are one share of a job, so that all take as long.

    A run that starts from another is in the share of that one.

    Args:
        steps: Of each arm.
        roots: The arm that each starts from, in the end; itself if from none.
        seeds: How many.
        share: Which one, from 1, and of how many.
    """
    groups = collections.Counter(
        {
            (root, seed): sum(n for arm, n in steps.items() if roots[arm] == root)
            for root in dict.fromkeys(roots.values())
            for seed in range(seeds)
        }
    )
    loads = [0] * share[1]
    found: set[tuple[str, int]] = set()
    for (root, seed), number in groups.most_common():
        least = loads.index(min(loads))
        loads[least] += number
        if least == share[0] - 1:
            found |= {(arm, seed) for arm in steps if roots[arm] == root}
    return found


def _run_all(
    config: Config, plan: Plan, runs: Runs, console: rich.console.Console
) -> None:
    """Do the runs that have no scores yet; then measure what width.png shows."""
    directory = config.directory
    validated = any(r.stopped_early for arm in plan for r in arm.readouts)
    names = ("train", *("validation",) * validated, "test")
    splits = load_splits(config.data, names)
    sizes = ", ".join(f"{s.num_examples:,} {name}" for name, s in splits.items())
    console.print(f"{config.name}: {sizes} examples of {splits['train'].source}")
    trainer = Trainer(config, splits)
    compiled = {arm.name: trainer.compile(arm) for arm in plan}
    steps = {name: arm.steps for name, arm in compiled.items()}
    mine = share_of_runs(steps, plan.roots, config.seeds, config.share)
    total = sum(steps[name] for name, _ in mine)
    header = {
        "config": settings_of(config),
        "scored_by": config.data.scored_by,
        "arms": [_describe(arm) for arm in compiled.values()],
    }
    with (
        stop_on_signal() as stopper,
        open_log(directory, header, processes.is_main()) as log,
        progress_bar(console, len(mine), total, config.data.batch_size) as bar,
    ):
        scorer = trainer.scorer()
        outputs = Outputs(directory, config.saving, scorer, log, bar, stopper)
        # A seed at a time, so that a table can be built up seed by seed.
        for seed in range(config.seeds):
            for name, arm in compiled.items():
                if (name, seed) not in mine:
                    continue
                if runs[name, seed] is not None:
                    bar.skip_run(f"{arm.arm.label}, seed {seed}", arm.steps)
                    continue
                parent = compiled[arm.arm.parent] if arm.arm.parent else None
                runs[name, seed] = execute(arm, seed, outputs, parent)
    if config.saving.width_plot and len(mine) == len(runs):
        console.print("measuring the loss around the solutions, for width.png")
        measure_width(
            directory,
            compiled[plan.baseline.name],
            compiled[plan.longest.name],
            trainer.scorer(config.data.width_examples),
            config.data.scored_by,
        )


def _describe(compiled: CompiledArm) -> Line:
    """What figures need to know of an arm."""
    arm = compiled.arm
    return {
        "name": arm.name,
        "label": arm.label,
        "epochs": arm.epochs,
        "first_epoch": arm.first_epoch,
        "parent": arm.parent,
        "steps_per_epoch": compiled.steps_per_epoch,
        "averages_from": arm.averages_from,
    }


def _write_results(config: Config, plan: Plan, runs: Runs) -> None:
    """Write results.json, the last file of a job."""
    rows = results.make_rows(plan)
    for (arm, label), row in rows.items():
        for seed in range(config.seeds):
            found = runs[arm, seed]
            assert found is not None
            row.add(found.scores[label])
    table, path = list(rows.values()), config.directory.results
    seconds = [run.seconds for run in runs.values() if run is not None]
    content = {
        "config": settings_of(config),
        "rows": [dataclasses.asdict(row) for row in table],
        "comparisons": [c._asdict() for c in results.compare(table, plan)],
        "seconds": None if None in seconds else sum(s or 0 for s in seconds),
        "provenance": provenance(),
    }
    # Of a job that was only shown again, the machine that did it counts.
    if processes.is_main() and path.is_file():
        before = json.loads(path.read_text())
        if all(before.get(n) == content[n] for n in ("rows", "seconds")):
            content["provenance"] = before.get("provenance")
    write_json(path, content)
