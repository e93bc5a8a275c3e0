"""The benchmark measures what it says, and how: not how fast anything is."""

import dataclasses
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swa_jax
from experiments.benchmark import __main__ as command
from experiments.benchmark import (
    alone,
    averages,
    batch_norm,
    checkpoints,
    measuring,
    peers,
    training,
    trees,
)
from experiments.benchmark.measuring import Line, Options


@pytest.fixture
def small_params(monkeypatch):
    """In place of ResNet-50's."""
    params = {"w": jnp.ones((8, 16)), "b": jnp.zeros(16)}
    monkeypatch.setattr(trees, "resnet50_params", lambda: params)


def assert_measured(line: Line, section: str) -> None:
    assert line.section == section
    assert 0 < line.low <= line.ratio <= line.high < math.inf


def test_each_round_begins_with_another():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measuring.take_turns(actions, 4)
    warm_up, *rounds = (calls[i : i + 3] for i in range(0, len(calls), 3))
    assert warm_up == ["a", "b", "c"]
    assert list(map("".join, rounds)) == ["abc", "bca", "cab", "abc"]
    assert list(seconds) == ["a", "b", "c"]
    assert all(len(x) == 4 and min(x) >= 0 for x in seconds.values())


def test_compare_is_round_by_round():
    # Ratios 2, 4, 3, 8, 1: no quotient of medians, which is 4.
    pair = [2.0, 4.0, 6.0, 8.0, 4.0], [1.0, 1.0, 2.0, 1.0, 4.0]
    line = measuring.compare("b", "this over that", pair, "at most 1", "a note")
    assert line == Line("b", "this over that", 3.0, 2.0, 4.0, "at most 1", "a note")
    with pytest.raises(ValueError, match="zip"):
        measuring.compare("b", "", ([1.0, 2.0], [1.0]), "")


def test_times_are_in_milliseconds():
    line = measuring.in_milliseconds("f", "a call", [0.002, 0.004, 0.003], "under 5")
    assert line == Line("f", "a call, in ms", 3.0, 2.5, 3.5, "under 5")


def test_markdown():
    lines = [
        Line("a", "this", 1.0004, 0.5, 2.0, "at most 1.02", "note"),
        Line("f", "that", 23.4, 17.8, 27.2, ""),
    ]
    assert command.markdown(lines) == (
        "| | Ratio | Median | Quartiles | Target | |\n"
        "|---|---|---:|---|---|---|\n"
        "| a | this | 1.000 | 0.500 to 2.000 | at most 1.02 | note |\n"
        "| f | that | 23.400 | 17.800 to 27.200 |  |  |\n"
    )


def test_plain_loop_without_openmp_is_numpys(monkeypatch):
    def refuse(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(alone.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(alone.subprocess, "run", refuse)
    run, name = alone.plain_loop(4)
    run()
    assert name == "NumPy"


def test_plain_loop_without_a_compiler_is_numpys(monkeypatch):
    monkeypatch.setattr(alone.shutil, "which", lambda name: None)
    assert alone.plain_loop(4)[1] == "NumPy"


def test_the_loop_in_c_leaves_subnormals_alone():
    """-ffast-math would have them zero in every later test: in a thread of its own."""
    found = []

    def load():
        found.extend([alone.c_average(4), sys.float_info.min / 2])

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    loop, half = found
    if loop is None:
        pytest.skip("no C compiler that knows OpenMP")
    assert half == 2.0**-1023


def test_compiling_alternates(monkeypatch):
    order = []

    class Training:
        def __init__(self, options, optimizer):
            # SGD's state with momentum, and the average if there is one.
            self.averages = len(optimizer.init(jnp.zeros(2))) > 1

        def compile_seconds(self):
            order.append(self.averages)
            return 3.0 if self.averages else 2.0

    monkeypatch.setattr(training, "Training", Training)
    (line,) = training.compile_time(Options(rounds=8))
    assert order == [True, False, False, True] * 2
    assert (line.ratio, line.note) == (1.5, "without: 2.0 s")


def test_profile_is_for_who_asks():
    assert command._USUAL == ("a", "b", "c", "d", "e", "f", "g")
    assert "p" in command.SECTIONS


def test_convolutions_have_as_many_weights_as_pytorchs():
    model = batch_norm.Convolutions()
    images = np.zeros((2, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=True))
    sizes = [x.size for x in jax.tree.leaves(shapes["params"])]
    convolutions = 9 * (3 * 64 + 64 * 128 + 128 * 256)
    assert sum(sizes) == convolutions + 2 * (64 + 128 + 256)
    out = jax.eval_shape(lambda v: model.apply(v, images, train=False), shapes)
    assert out.shape == (2, 2, 2, 256)


def test_passes_over_a_network():
    batches = list(np.random.default_rng(0).normal(size=(3, 2, 8, 8, 3)))
    model = batch_norm.Convolutions(widths=(4, 4))
    actions = batch_norm.forward_passes(model, [jnp.float32(b) for b in batches])
    assert list(actions) == ["pass", "training", "inference"]
    statistics = actions["pass"]()
    assert len(jax.tree.leaves(statistics)) == 4
    assert actions["training"]() is None
    outputs: Any = actions["inference"]()
    assert [x.shape for x in outputs] == [(2, 2, 2, 4)] * 3


@pytest.mark.slow
def test_the_pass_is_measured_over_forty_batches(monkeypatch):
    small = batch_norm.Convolutions(widths=(4, 4))
    monkeypatch.setattr(batch_norm, "ResNet", lambda stages, data: small)
    options = Options(rounds=2, batch_size=8, image_size=8)
    lines = [x for x in batch_norm.batch_norm_pass(options) if "PyTorch" not in x.what]
    assert len(lines) == 3
    for line in lines:
        assert_measured(line, "d")
    assert lines[0].target == "at most 1.1"
    assert lines[0].note.endswith(" ms an image, 40 batches")


@pytest.mark.slow
@pytest.mark.usefixtures("small_params")
def test_sections_run(tmp_path, capsys):
    output = tmp_path / "results.json"
    args = ["--rounds", "2", "--only", *"bcfp", "--output", str(output)]
    assert command.main(args) == 0
    content = json.loads(output.read_text())
    assert list(content) == ["machine", "options", "lines"]
    assert content["options"]["only"] == list("bcfp")
    lines = [Line(**line) for line in content["lines"]]
    printed = capsys.readouterr().out
    for line in lines:
        assert_measured(line, line.section)
        assert line.what in printed
    assert command.markdown(lines) in printed
    (bandwidth,) = (x for x in lines if x.section == "b")
    assert bandwidth.note.endswith(" GB/s")
    (imported,) = (x for x in lines if x.section == "f")
    assert imported.what.endswith("in ms")
    profile = [x.what for x in lines if x.section == "p"]
    assert len(profile) == 6
    assert profile[-1] == "a call on 2 tiny arrays, JAX, in ms"


def test_peers_are_left_out_where_they_are_missing(monkeypatch):
    monkeypatch.setattr(peers, "_torch_average", lambda params: None)
    monkeypatch.setattr(peers, "_optax_swag", lambda: None)
    monkeypatch.setattr(trees, "resnet50_params", dict)
    assert list(peers.peers(Options())) == []


@pytest.mark.usefixtures("small_params")
def test_peers_are_compared_with_ours(monkeypatch):
    updates = []
    theirs = "theirs", lambda: updates.append(0)
    monkeypatch.setattr(peers, "_torch_average", lambda params: theirs)
    monkeypatch.setattr(peers, "_optax_swag", peers.swa_jax.swa)
    torch, optax_swag = peers.peers(Options(rounds=2))
    assert len(updates) == 1 + 3 * 2  # warm-up and rounds
    for line in (torch, optax_swag):
        assert line.ratio >= 0
        assert dataclasses.replace(line, target="").target != line.target
    assert torch.what == "time of theirs over ours"


@pytest.mark.slow
@pytest.mark.usefixtures("small_params")
def test_averages_are_compared_with_swa_and_with_others(monkeypatch):
    updates = []
    theirs = "theirs", lambda: updates.append(0)
    others = (lambda params: theirs, "at least 5"), (lambda params: None, "")
    monkeypatch.setattr(averages, "PEERS", others)
    *lines, other = averages.averages(Options(rounds=2))
    for line in lines:
        assert_measured(line, "g")
    whats = [line.what for line in lines]
    for name in averages.AVERAGES:
        for turn in ("sampled", "skipped"):
            assert f"sgd's step with {name} over swa(), {turn}" in whats
        assert f"update_average with {name} over swa()" in whats
    assert sum("incremental_update" in what for what in whats) == 1
    assert sum("bfloat16" in what for what in whats) == 1
    assert len(whats) == 3 * 4 + 2
    assert {x.what for x in lines if x.target == "at most 1.05"} == {
        what
        for what in whats
        if what.startswith(("sgd", "update"))
        and "ema(0.9" in what
        and "incremental" not in what
    }
    assert len(updates) == 1 + 3 * 2  # warm-up and rounds
    assert (other.what, other.target) == (
        "time of theirs over update_average with ema(0.999)",
        "at least 5",
    )


def test_skipped_steps_average_nothing_and_sampled_ones_do():
    params = {"w": jnp.ones(3)}
    makes: list[Callable[..., Any]] = [swa_jax.swa, *averages.AVERAGES.values()]
    for make in makes:
        for period, count in ((1, 2), (10**9, 0)):
            step = peers.OptimizerStep(params, make(period=period))
            step.run()
            step.run()
            state = swa_jax.average_state(step.state[1])
            assert (state.num_updates, state.num_averaged) == (2, count)


def test_peers_of_ema_run_where_they_are_installed():
    params = {"w": jnp.ones((8, 16)), "b": jnp.zeros(16)}
    found = [other for make, _ in averages.PEERS if (other := make(params))]
    for _, update in found:
        update()
    assert any("flax" in name for name, _ in found) == hasattr(nnx, "EMA")


@pytest.mark.slow
def test_checkpoints_are_measured_and_removed(tmp_path):
    options = Options(rounds=2, checkpoint_bytes=6_400, scratch=tmp_path)
    lines = list(checkpoints.checkpoints(options))
    for line, kind in zip(lines, ("safetensors", "msgpack", "orbax"), strict=True):
        assert line.ratio > 0
        assert kind in line.what
        assert "peak of memory" in line.note
    assert not list(tmp_path.iterdir())
