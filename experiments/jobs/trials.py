"""Trials of a tuning, and the file that keeps them: tuning.json."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from experiments.config.schema import FREE
from experiments.runtime import processes
from experiments.runtime.errors import StorageError
from experiments.runtime.files import write_json
from experiments.runtime.workdir import Settings, Workdir, changes

# What decides a trial: arm, learning rate, weight decay, swa_lr and control_lr.
Setting = tuple[str, float, float, float | None, float | None]
_RATES = ("learning_rate", "weight_decay", "swa_lr", "control_lr")
# Settings in which an earlier tuning may differ for its trials to count. Those that a
# trial varies are in the trial; the grids say only which trials there are; and tuning
# holds out in any case.
_FREE = FREE | {*_RATES, *(f"tune_{rate}s" for rate in _RATES), "hold_out", "peaks"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of a tuning grid: a line of the results, scored with several seeds.

    The fields are those of a trial in tuning.json.
    """

    label: str  # of the line
    arm: str
    learning_rate: float
    weight_decay: float
    swa_lr: float | None  # None where the arm does not use it
    control_lr: float | None
    accuracy: tuple[float, ...]  # on the validation split, one per seed; fractions
    loss: tuple[float, ...]

    @property
    def setting(self) -> Setting:
        """What was tried."""
        rates = self.learning_rate, self.weight_decay, self.swa_lr, self.control_lr
        return self.arm, *rates


class Record:
    """tuning.json: trials that are done, of this process and of those before it."""

    def __init__(self, directory: Workdir, settings: Settings) -> None:
        """Read what is there, and make sure that more can be written.

        Raises:
            StorageError: The directory cannot be written, or the file is of a tuning
                with other settings, or damaged.
        """
        self._directory, self._path = directory, directory.tuning
        self._settings = settings
        found = processes.from_main(self._open)
        self._earlier = [_trial(each) for each in found["trials"]]

    def _open(self) -> dict[str, Any]:
        changed: list[str] = []
        try:
            if self._path.exists():
                content = json.loads(self._path.read_text())
                changed = changes(content["config"], self._settings, _FREE)
                for each in content["trials"]:
                    _trial(each)
            else:
                content = self._content([], None)
            if not changed:
                write_json(self._path, content)  # as it was: can it be written?
        except OSError as error:
            raise self._directory.unwritable(error) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self._path} is damaged ({type(error).__name__}: {error})."
                " Move it away, or give another --workdir."
            ) from error
        if changed:
            raise StorageError(
                f"{self._path} is of a tuning with other settings:"
                f" {'; '.join(changed)}. Move it away, or give another --workdir."
            )
        return content

    def _content(self, trials: Sequence[Trial], chosen: Any) -> dict[str, Any]:
        return {
            "config": self._settings,
            "chosen": chosen,
            "trials": [dataclasses.asdict(trial) for trial in trials],
        }

    def find(self, setting: Setting, labels: Sequence[str]) -> list[Trial] | None:
        """The trials of a setting, in the order of `labels`, if all are there."""
        known = {t.label: t for t in self._earlier if t.setting == setting}
        return [known[n] for n in labels] if known.keys() >= set(labels) else None

    def write(self, trials: list[Trial], chosen: dict[str, Any] | None) -> None:
        """Write these trials, and after them earlier ones that are not among them."""
        done = {trial.setting for trial in trials}
        others = [trial for trial in self._earlier if trial.setting not in done]
        write_json(self._path, self._content([*trials, *others], chosen))


def _trial(content: dict[str, Any]) -> Trial:
    scores = {name: tuple(content[name]) for name in ("accuracy", "loss")}
    return Trial(**{**content, **scores})
