"""The work directory: whose it is, and who may write."""

import json

import pytest

from experiments.config.named import DIGITS
from experiments.config.schema import FREE, settings_of
from experiments.runtime.errors import StorageError
from experiments.runtime.workdir import Workdir


@pytest.mark.parametrize("trace", ["metrics.jsonl", "runs"])
def test_workdir_belongs_to_the_settings_of_the_job_that_began(tmp_path, trace):
    settings = {"name": "a", "epochs": 4, "workdir": "a", "widths": [4, 4]}
    with Workdir(tmp_path / "w").locked(settings, FREE):
        (tmp_path / "w" / trace).touch()
    with Workdir(tmp_path / "w").locked({**settings, "workdir": "b"}, FREE):
        pass  # free to change
    changed = {**settings, "epochs": 5, "widths": [8]}
    with (
        pytest.raises(
            StorageError,
            match=r"epochs was 4, now 5; widths was \[4, 4\], now \[8\]\. Give another",
        ),
        Workdir(tmp_path / "w").locked(changed, FREE),
    ):
        pass
    found = json.loads((tmp_path / "w" / "config.json").read_text())
    assert found == {**settings, "workdir": "b"}  # what ran last


def test_workdir_where_nothing_began_is_taken_over(tmp_path):
    """A command that failed for want of data, say, is corrected and given again."""
    for epochs in (4, 5):
        settings = {"name": "a", "epochs": epochs}
        with Workdir(tmp_path).locked(settings):
            assert json.loads((tmp_path / "config.json").read_text()) == settings


def test_workdir_has_one_job_at_a_time(tmp_path):
    with (
        Workdir(tmp_path).locked({"name": "a"}),
        pytest.raises(StorageError, match="is in use by another job"),
        Workdir(tmp_path).locked({"name": "a"}),
    ):
        pass
    with Workdir(tmp_path).locked({"name": "a"}):
        pass  # the first has let go


def test_workdir_that_is_none(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(StorageError, match=r"which cannot be written .*File exists"),
        Workdir(file).locked({}),
    ):
        pass


@pytest.mark.parametrize("content", ["not json", '["a"]', '{"theme": "dark"}'])
def test_config_of_another_program_is_left_alone(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with (
        pytest.raises(StorageError, match=r"config\.json is not a job's configuration"),
        Workdir(tmp_path).locked({"name": "a"}),
    ):
        pass
    assert path.read_text() == content


def test_free_settings_exist():
    assert settings_of(DIGITS).keys() >= FREE


def test_figures_have_a_lock_of_their_own(tmp_path):
    """A report may be made beside a job, but not two at a time."""
    directory = Workdir(tmp_path)
    with (
        directory.locked({"name": "a"}),
        directory.drawing(),
        pytest.raises(StorageError, match="in use by another report or export"),
        directory.drawing(),
    ):
        pass
    with directory.drawing():
        pass


def test_settings_that_one_version_does_not_know_are_no_changes(tmp_path):
    directory = Workdir(tmp_path)
    with directory.locked({"name": "a", "epochs": 4, "dataset": "old"}):
        directory.metrics.touch()
    with directory.locked({"name": "a", "epochs": 4, "depth": 3}):
        pass
