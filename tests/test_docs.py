"""The pages in docs/: their examples run, their tables are true."""

import json
import pathlib
import re
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax
import swa_jax.frameworks  # names of its modules are in the pages
from experiments.benchmark import precision
from experiments.config.named import EXPERIMENTS
from experiments.config.schema import settings_of
from experiments.reporting import tables
from experiments.runtime.workdir import Workdir
from experiments.training.protocols import FineTune
from tests.swa_jax.transformations import bits

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def examples(page: str) -> str:
    """The page's Python, in order; ```python torch blocks are for reading only."""
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL))


def run(page: str) -> dict[str, Any]:
    """What a page's examples leave behind, run one after the other."""
    namespace: dict[str, Any] = {}
    # Users do not forbid rank promotion, as these tests do.
    with jax.numpy_rank_promotion("allow"):
        exec(compile(examples(page), page, "exec"), namespace)
    return namespace


def test_every_page_with_examples_is_run_here():
    pages = {page for page in PAGES if examples(page)}
    assert pages == {
        "averages.md",
        "evaluation.md",
        "coming-from-pytorch.md",
        "frameworks.md",
        "how-to-choose.md",
        "optax-pipelines.md",
        "published-method.md",
        "quick-start.md",
        "saving.md",
        "schedules.md",
        "training-loops.md",
    }


@pytest.mark.parametrize("page", PAGES)
def test_names_exist_and_links_lead_somewhere(page):
    for name in re.findall(r"swa_jax\.(\w+)", PAGES[page]):
        assert hasattr(swa_jax, name), f"{page} mentions swa_jax.{name}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (ROOT / "docs" / target).exists(), f"{page} links to {target}"


# quick-start.md and optax-pipelines.md


def printed(text: str) -> list[float]:
    """The numbers at the ends of what was printed."""
    return [float(line.rpartition(" ")[2]) for line in text.strip().splitlines()]


@pytest.mark.slow
def test_quick_start(capsys):
    nnx, linen = re.findall(r"```python\n(.*?)```", PAGES["quick-start.md"], re.DOTALL)
    exec(compile(nnx, "quick-start.md", "exec"), {})
    (shown,) = re.findall(r"```text\n(.*?)```", PAGES["quick-start.md"], re.DOTALL)
    found = printed(capsys.readouterr().out)
    # Ten of the 297 images: CPUs round differently, and training goes on from it.
    np.testing.assert_allclose(found, printed(shown), atol=10 / 297)
    exec(compile(linen, "quick-start.md", "exec"), {})
    (accuracy,) = printed(capsys.readouterr().out)
    assert 0.85 < accuracy < 1


def test_a_network_with_dropout_takes_the_same_steps():
    example = examples("quick-start.md").partition("import functools")[0]
    for before, after in [
        ("nnx.relu,\n", "nnx.relu, nnx.Dropout(0.5, rngs=rngs),\n"),
        ("range(300)", "range(20)"),
        ("start_step=200", "start_step=10"),
    ]:
        assert before in example
        example = example.replace(before, after)
    found: dict[str, Any] = {}
    exec(compile(example, "quick-start.md, with Dropout", "exec"), found)
    averaged, recomputed = found["averaged"], found["recomputed"]
    # What comes before any Dropout is a function of weights and data alone.
    first, norm = (
        {name: np.asarray(leaf[...], np.float64) for name, leaf in layers.items()}
        for layers in (averaged["layers"][0], recomputed["layers"][1])
    )
    images = np.asarray(found["images"][:1500], np.float64)
    inputs = images @ first["kernel"] + first["bias"]
    # float32 sums of 1,500 terms: relative errors of 1e-6, of values near 10.
    np.testing.assert_allclose(norm["mean"], inputs.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm["var"], inputs.var(0), rtol=1e-4)


def test_two_averages_in_one_chain(capsys):
    run("optax-pipelines.md")
    (accuracy,) = printed(capsys.readouterr().out)
    assert 0.85 < accuracy < 1


# schedules.md and saving.md


def test_schedules_end_at_the_rates_that_are_named():
    namespace = run("schedules.md")
    start, last = namespace["start"], 40 * namespace["steps"] - 1
    ends = {name: float(of(last)) for name, of in namespace["schedules"].items()}
    cyclical = ends.pop("cyclical")
    assert cyclical == np.float32(0.001)
    assert set(ends.values()) == {float(np.float32(0.1))}
    joined = namespace["schedules"]["cosine, then constant"]
    assert joined(start - 2) > joined(start) == np.float32(0.1)


def test_averages_come_back_from_files():
    namespace = run("saving.md")
    expected = bits(namespace["average"])
    for name in ("from_orbax", "from_flax"):
        assert bits(namespace[name]) == expected
    assert "lost its structure" in namespace["complaint"]
    params = namespace["state"]["params"]
    rescued = swa_jax.swa_params(namespace["rescued"], params)
    assert bits(rescued) == expected


# published-method.md


@pytest.mark.slow
def test_both_forms_of_the_published_method_agree(capsys):
    namespace = run("published-method.md")
    # Chance is 0.1; ten epochs of this network give about 0.9 on these writers.
    assert 0.85 < namespace["accuracy"] < 1
    # Both round every update of 150 alike, but compiled in different programs.
    assert namespace["largest_difference"] < 1e-5
    assert [line["swa/num_averaged"] for line in namespace["log"]] == [1, 2, 3, 4]
    assert "test accuracy" in capsys.readouterr().out


# benchmark.md


@pytest.mark.parametrize("number", [100, 1_000, 10_000])
def test_errors_of_means_are_those_of_the_command(number):
    shown = re.findall(
        rf"^\| {number:,} \| (\S+) \| (\S+) \|$", PAGES["benchmark.md"], re.M
    )
    [figures] = [[float(x) for x in row] for row in shown]
    # Where a compiler contracts a product and a sum, roundings fall otherwise.
    np.testing.assert_allclose(precision.errors(number), figures, rtol=0.3)


# averages.md


@pytest.mark.slow
def test_every_average_trains():
    results = run("averages.md")["results"]
    assert len(results) == 14
    for name, accuracy in results.items():
        assert 0.85 < accuracy < 1, name


def test_effective_windows_are_those_of_the_averages():
    page = PAGES["averages.md"]
    [header] = re.findall(r"^\| After n models \| (.+) \|$", page, re.M)
    calls = re.findall(r"`(.+?)`", header)
    names = {name: getattr(swa_jax, name) for name in swa_jax.__all__}
    rows = re.findall(r"^\| ([\d,]+) \| (.+) \|$", page, re.M)
    assert [row[0] for row in rows] == ["10", "100", "1,000", "10,000"]
    for n, figures in rows:
        count = int(n.replace(",", ""))
        found = [swa_jax.effective_window(eval(call, names), count) for call in calls]
        assert " | ".join(f"{window:.1f}" for window in found) == figures


# evaluation.md


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(tmp_path):
    page = run("evaluation.md")
    state, best = page["state"], page["best"]
    assert 0.85 < page["evaluate"](best["params"], best["batch_stats"]) < 1
    alone, _ = page["run"](12, evaluating=False)
    assert bits(alone) == bits(state)
    # Stopped in between, and gone on with from the raw weights.
    page["run"](6, tmp_path)
    resumed, best_of_both = page["run"](12, tmp_path)
    assert bits(resumed) == bits(state)
    assert bits(best_of_both) == bits(best)
    for momentum, kinds in page["costs"].items():
        [row] = re.findall(rf"^\| {momentum} \| (.+) \|$", PAGES["evaluation.md"], re.M)
        shown = [re.split(r" ± .+?, ", cell) for cell in row.split(" | ")]
        # Another machine trains other networks.
        accuracies, losses = zip(*np.array(shown, float), strict=True)
        np.testing.assert_allclose(kinds[:, 0].mean(-1), accuracies, atol=2)
        np.testing.assert_allclose(kinds[:, 1].mean(-1), losses, rtol=0.3)
    (recomputed, along, _), (_, quick, _) = (x[:, 1] for x in page["costs"].values())
    assert (recomputed < along).all()  # with every seed
    assert (quick < along).all()


# training-loops.md


@pytest.mark.slow
def test_every_loop_trains():
    page = run("training-loops.md")
    assert set(page["results"]) == {
        "beside the optimizer",
        "the first of four seeds",
        "TrainState",
        "pmap",
        "begun without",
    }
    for name, accuracy in page["results"].items():
        assert 0.8 < accuracy < 1, name
    assert int(page["count"]) == 0
    assert np.ptp(page["everywhere"]["w"], axis=0).max() == 0
    # One with the devices' axis, one without: told, not guessed.
    with pytest.raises(ValueError, match=r"of shape \(64, 10\) opt_state holds"):
        swa_jax.swa_params(page["opt_state"], page["first"](page["p"]))


@pytest.mark.slow
def test_a_run_that_began_without_an_average_goes_on_as_if_it_had_one():
    page = run("training-loops.md")
    adam, weights, seen = optax.adam(0.05), {"w": jnp.zeros((64, 10))}, []
    state = adam.init(weights)
    for i in range(100):
        grads = jax.grad(page["loss"])(weights, *page["batch"](i))
        updates, state = adam.update(grads, state)
        weights = optax.apply_updates(weights, updates)
        seen.append(np.float64(weights["w"]))
    expected = np.mean(seen[59::10], axis=0)
    assert len(seen[59::10]) == 5
    np.testing.assert_allclose(page["of_five"]["w"], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(np.mean(seen[49::10], axis=0) - expected).max() > 1e-3


@pytest.mark.slow
def test_gradients_that_are_accumulated_by_a_link_count_batches():
    page = run("training-loops.md")
    seen = [np.float64(x) for x in page["seen"]]
    # Weights move at every fourth batch.
    moved = [i for i in range(1, 24) if np.any(seen[i] != seen[i - 1])]
    assert moved == [3, 7, 11, 15, 19, 23]
    expected = np.mean([seen[i - 1] for i in (12, 16, 20, 24)], axis=0)
    np.testing.assert_allclose(page["of_four"], expected, rtol=1e-5, atol=1e-7)


# frameworks.md


@pytest.mark.slow
def test_every_framework_trains():
    results = run("frameworks.md")["results"]
    assert set(results) == {"nnx", "linen", "equinox", "haiku", "keras"}
    for name, accuracy in results.items():
        assert 0.85 < accuracy < 1, name


# how-to-choose.md


@pytest.mark.slow
def test_every_choice_trains():
    results = run("how-to-choose.md")["results"]
    assert set(results) == {
        "constant rate",
        "cyclical rate",
        "no average",
        "EMA",
        "Schedule-Free",
    }
    for name, accuracy in results.items():
        assert 0.85 < accuracy < 1, name


RESULTS = {path.name: path for path in sorted((ROOT / "docs/results").iterdir())}


def read_results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS[name] / "results.json").read_text())


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_measured_figures_are_those_of_the_results(name):
    rows = read_results(name)["rows"][:5]
    accuracy = [f"{100 * statistics.fmean(row['accuracy']):.2f}" for row in rows]
    loss = [f"{statistics.fmean(row['loss']):.4f}" for row in rows]
    page = PAGES["how-to-choose.md"]
    for figures in (accuracy, loss):
        assert f"| {' | '.join(figures)} |" in page
    with_pass, along, without = (
        100 * statistics.fmean(row["accuracy"]) for row in rows[2:]
    )
    about = page[page.index("## BatchNorm") :]
    assert f"{with_pass - without:.1f}" in about
    assert f"{with_pass - along:.1f} points" in about or with_pass - along < 0.05


@pytest.mark.parametrize(
    "name",
    [n for n in RESULTS if isinstance(EXPERIMENTS[n].config.protocol, FineTune)],
)
def test_controls_are_those_of_the_results(name):
    content = read_results(name)
    accuracy = {
        row["label"]: f"{100 * statistics.fmean(row['accuracy']):.2f}"
        for row in content["rows"]
    }
    [tested] = [
        c
        for c in content["comparisons"]
        if c["row"] == "SWA, 10 more epochs" and c["against"].startswith("control")
    ]
    whole = content["config"]["epochs"] + 10
    [scratch] = [
        a for label, a in accuracy.items() if label.endswith(f" {whole} epochs")
    ]
    figures = (
        accuracy[tested["against"]],
        accuracy[tested["row"]],
        f"{tested['accuracy_p']:.3f}",
        scratch,
    )
    assert f"| {' | '.join(figures)} |" in PAGES["how-to-choose.md"]


# results.md


@pytest.mark.parametrize("name", RESULTS)
def test_tables_are_those_of_the_results(name):
    page = PAGES["results.md"]
    results = tables.Results.read(Workdir(RESULTS[name]))
    markdown = tables.make_markdown(results)
    assert (RESULTS[name] / "results.md").read_text() == markdown
    if name.startswith("any_budget"):  # a column for each budget, all of them
        lines, quoted = markdown.splitlines(), []
    else:
        lines = markdown.splitlines()[: len(results.rows) + 2]
        quoted = tables.comparison_cells(results.comparisons)
        quoted = [
            cells
            for cells in quoted
            if cells[0].startswith("SWA") and "10" in cells[0]
            if "last iterate (" not in cells[1]
        ]
        assert quoted
    for line in lines:
        assert f"\n{line}\n" in page
    for cells in quoted:
        assert f"\n| {' | '.join(cells)} |\n" in page
    assert f"`python -m experiments {name}" in page
    shown = {ROOT / "docs" / path for path in re.findall(r"!\[[^]]*\]\((\S+)\)", page)}
    assert set(RESULTS[name].glob("*.png")) <= shown


@pytest.mark.parametrize("name", RESULTS)
def test_rates_of_the_configurations_were_chosen_on_the_validation_split(name):
    """The page says so; the record of every trial is in tuning.json."""
    tuning = json.loads((RESULTS[name] / "tuning.json").read_text())
    config = read_results(name)["config"]
    named = settings_of(EXPERIMENTS[name].config)
    for setting, chosen in tuning["chosen"].items():
        assert config[setting] == pytest.approx(chosen, rel=1e-2)
        assert named[setting] == config[setting]
