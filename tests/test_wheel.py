"""What a release ships: a small wheel that works beside JAX and Optax alone."""

import pathlib
import re
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

import swa_jax

ROOT = pathlib.Path(__file__).parents[1]
#: The shortest use: an average in a chain, in a loop, its statistics, and a soup.
USE = """
import sys
import jax, jax.numpy as jnp, optax, swa_jax
tx = optax.chain(optax.sgd(0.1), swa_jax.swa(start_step=2), swa_jax.ema(0.9))
params = {"w": jnp.arange(4.0)}
opt_state = tx.init(params)
@jax.jit
def step(params, opt_state):
    updates, opt_state = tx.update(params, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
for _ in range(3):
    params, opt_state = step(params, opt_state)
averaged = swa_jax.swa_params(opt_state, params)
expected = jnp.arange(4.0) * (0.9**2 + 0.9**3) / 2
assert jnp.allclose(averaged["w"], expected), averaged
def forward(params, batch_stats, batch):
    return {"mean": 0.9 * batch_stats["mean"] + 0.1 * (params["w"] * batch).mean()}
stats = {"mean": jnp.zeros(())}
found = swa_jax.recompute_batch_stats(forward, averaged, stats, [jnp.ones((2, 4))])
assert jnp.allclose(found["mean"], expected.mean())
assert jnp.allclose(swa_jax.soup([params, averaged])["w"], (params["w"] + expected) / 2)
others = {"flax", "chex", "orbax", "tensorflow", "torch", "keras", "haiku", "equinox"}
assert not others & set(sys.modules), others & set(sys.modules)
print(swa_jax.__version__, swa_jax.__file__)
"""


def run(*command, **options):
    """The output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_holds_the_library_alone(wheel):
    assert wheel.name == f"swa_jax-{swa_jax.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 200_000  # 167 KB, most of it docstrings
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"swa_jax-{swa_jax.__version__}.dist-info/METADATA")
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"swa_jax", f"swa_jax-{swa_jax.__version__}.dist-info"}
    assert "swa_jax/py.typed" in names
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.MULTILINE)
    always = {re.split(r"[<>= ]", n)[0] for n in needs if "extra ==" not in n}
    assert always == {"jax", "optax"}
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata.decode(), re.MULTILINE))
    assert {"checkpoints", "equinox", "flax", "haiku", "keras"} <= extras


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """With JAX and Optax alone, away from the clone."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel)
    (tmp_path / "use.py").write_text(USE)
    shown = run(python, "-W", "error", "use.py", cwd=tmp_path)
    version, place = shown.split()
    assert version == swa_jax.__version__
    assert pathlib.Path(place).is_relative_to(tmp_path / "env")


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {swa_jax.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text()
    date = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)
    assert date is not None
    assert f"\n## {swa_jax.__version__} - {date[1]}\n" in changes


def test_extras_for_users_are_those_of_the_modules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {
        path.stem
        for path in (ROOT / "swa_jax" / "frameworks").glob("*.py")
        if not path.stem.startswith("_")
    }
    assert modules <= project["optional-dependencies"].keys()
