import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.runtime.errors import StorageError
from experiments.runtime.metrics import open_log, read_log
from experiments.runtime.workdir import Workdir

ARM = {
    **{"name": "sgd", "label": "SGD", "epochs": 1, "first_epoch": 0},
    **{"parent": None, "steps_per_epoch": 3, "averages_from": None},
}
HEADER = {"config": {"name": "digits", "seeds": 2}, "arms": [ARM]}
RUN = {"arm": "sgd", "seed": 0}


def write(workdir):
    with open_log(Workdir(workdir), HEADER) as log:
        log.write("step", **RUN, step=1, batch_loss=0.75, learning_rate=0.5)
        log.write("test", **RUN, epoch=1, weights="iterate", accuracy=0.25, loss=2.0)
        log.write(
            "train",
            **RUN,
            epoch=1,
            step=3,
            batch_loss=0.5,
            batch_accuracy=0.75,
            learning_rate=0.25,
            examples_per_second=8.0,
        )


def test_tensorboard_reads_what_was_logged(tmp_path):
    write(tmp_path)
    (directory,) = (tmp_path / "tensorboard").iterdir()
    assert directory.name == "sgd-seed0"
    events = EventAccumulator(str(directory))
    events.Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert found == {
        "step/batch_loss": [(1, 0.75)],
        "step/learning_rate": [(1, 0.5)],
        "test/iterate/accuracy": [(1, 0.25)],
        "test/iterate/loss": [(1, 2.0)],
        "train/batch_loss": [(3, 0.5)],
        "train/batch_accuracy": [(3, 0.75)],
        "train/learning_rate": [(3, 0.25)],
        "train/examples_per_second": [(3, 8.0)],
        "train/epoch": [(3, 1.0)],
    }


def test_an_average_has_scalars_of_its_own(tmp_path):
    values = {"num_averaged": 2, "distance": 0.5}
    with open_log(Workdir(tmp_path), HEADER) as log:
        log.write("average", **RUN, epoch=2, step=6, **values)
    (line,) = read_log(tmp_path / "metrics.jsonl").of("average", "sgd", 0)
    assert {name: line[name] for name in values} == values
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sgd-seed0"))
    events.Reload()
    (found,) = events.Scalars("average/distance")
    assert (found.step, found.value) == (6, 0.5)


def test_a_resumed_log_counts_the_last_of_each_event(tmp_path):
    write(tmp_path)
    with open_log(Workdir(tmp_path), HEADER) as log:
        log.write("resumed", **RUN, step=0)
        log.write("step", **RUN, step=1, batch_loss=0.5, learning_rate=0.5)
        log.write("step", arm="sgd", seed=1, step=1, batch_loss=9.0, learning_rate=0.5)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count('"event": "config"') == 1
    parsed = read_log(tmp_path / "metrics.jsonl")
    assert parsed.config == HEADER["config"]
    more = {**HEADER, "config": {"name": "digits", "seeds": 3}}
    for _ in range(2):
        with open_log(Workdir(tmp_path), more):
            pass
    again = read_log(tmp_path / "metrics.jsonl")
    assert again._replace(header=parsed.header) == parsed
    assert read_log(tmp_path / "metrics.jsonl").config["seeds"] == 3
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count('"event": "config"') == 2
    assert [line["batch_loss"] for line in parsed.of("step", "sgd", 0)] == [0.5]
    assert [line["batch_loss"] for line in parsed.of("step", "sgd", 1)] == [9.0]
    assert len(parsed.of("test", "sgd", 0)) == 1


def test_half_a_line_is_none(tmp_path):
    write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = read_log(path)
    with path.open("a") as file:
        file.write('{"event": "step", "arm"')
    assert read_log(path) == whole
    with open_log(Workdir(tmp_path), HEADER) as log:  # the next job cuts it off
        log.write("finished", **RUN)
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "finished"
    assert [json.loads(line) for line in lines]


def test_other_processes_write_nothing(tmp_path):
    with open_log(Workdir(tmp_path / "run"), HEADER, enabled=False) as log:
        log.write("step", **RUN, step=1, batch_loss=0.75, learning_rate=0.5)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "no json\n", '{"event": "step"}\n', "[1]\n"])
def test_what_is_no_log_is_an_error(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(StorageError, match="cannot be read"):
        read_log(path)
    path.write_text(content)
    with pytest.raises(StorageError, match="does not begin with a job's configuration"):
        read_log(path)


def test_a_log_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    header = {"config": {"name": "shakespeare", "dataset": "shakespeare"}}
    lines = [
        {"event": "config", **header, "arms": [ARM]},
        {"event": "train", **RUN, "epoch": 1, "step": 3, "loss": 0.5, "accuracy": 0.25},
        {"event": "test", **RUN, "epoch": 1, "weights": "iterate", "loss": 2.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_log(path)
    assert log.scored_by == "loss"
    (train,) = log.of("train", "sgd", 0)
    assert (train["batch_loss"], train["batch_accuracy"]) == (0.5, 0.25)
    (test,) = log.of("test", "sgd", 0)
    assert test["loss"] == 2.0
