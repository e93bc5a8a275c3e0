"""The pass over models of Keras on JAX, and averages in ``fit``, against NumPy."""

from collections.abc import Callable

import jax
import keras
import numpy as np
import pytest

import swa_jax
from swa_jax.frameworks import keras as frameworks

from .populations import BATCHES, assert_statistics, f64, two_layers

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

EPS = 1e-3  # Keras's default
X = np.concatenate(BATCHES)
Y = np.random.default_rng(9).integers(0, 2, len(X)).astype(np.int32)
#: Updates an epoch, of batches of 8.
STEPS = 5


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Keras's own layers promote ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def make(rate=0.0, *, norms=True):
    """Linear, norm, tanh, dropout, linear, norm and a head, with perturbed weights."""
    keras.utils.set_random_seed(0)
    norm = keras.layers.BatchNormalization if norms else keras.layers.Identity
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, name="first"),
        norm(name="norm_0"),
        keras.layers.Activation("tanh"),
        keras.layers.Dropout(rate),
        keras.layers.Dense(2, name="second"),
        norm(name="norm_1"),
        keras.layers.Dense(2, name="head"),
    ]
    model = keras.Sequential(layers, name="net")
    rng = np.random.default_rng(5)
    for v in model.trainable_variables:
        v.assign(np.array(v.value) + 0.3 * rng.normal(size=v.shape))
    return model


def compiled(model, learning_rate=0.1, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(learning_rate, **options), loss)
    return model


def numpy(variables) -> list[np.ndarray]:
    return [np.array(getattr(v, "value", v)) for v in variables]


def bits(variables) -> list[bytes]:
    return [x.tobytes() for x in numpy(variables)]


def weights(layer):
    return numpy(layer.trainable_variables)


def statistics(model, name):
    layer = model.get_layer(name)
    return tuple(numpy([layer.moving_mean, layer.moving_variance]))


def assert_net(model, batches=BATCHES):
    first, norm, second = (
        weights(model.get_layer(name)) for name in ("first", "norm_0", "second")
    )
    expected = two_layers(first, norm, second, EPS, batches)
    for i, wanted in enumerate(expected):
        assert_statistics(statistics(model, f"norm_{i}"), wanted)


# The pass.


@pytest.mark.parametrize("what", ["x", "x, y", "dict"])
def test_statistics(what):
    model = compiled(make())
    state = [*model.trainable_variables, *model.optimizer.variables]
    before = bits(state)
    batches = {
        "x": BATCHES,
        "x, y": [(x, x[:, 0]) for x in BATCHES],
        "dict": [{"image": x} for x in BATCHES],
    }[what]
    inputs = "image" if what == "dict" else None
    recompute: Callable[..., object] = frameworks.recompute_batch_stats
    assert recompute(model, batches, inputs=inputs) is None
    assert_net(model)
    assert bits(state) == before


def test_dropout_draws_otherwise_in_every_batch():
    model = make(rate=0.5)
    seeds = [v for v in model.non_trainable_variables if "int" in str(v.dtype)]
    assert seeds
    before = bits(seeds)
    frameworks.recompute_batch_stats(model, BATCHES[:1])
    one = statistics(model, "norm_1")
    frameworks.recompute_batch_stats(model, BATCHES[:1])
    np.testing.assert_array_equal(one, statistics(model, "norm_1"))
    frameworks.recompute_batch_stats(model, BATCHES[:1] * 2)
    assert np.abs(one[0] - statistics(model, "norm_1")[0]).max() > 1e-3
    assert bits(seeds) == before
    first = weights(model.get_layer("first"))
    rows = f64(BATCHES[0]) @ f64(first[0]) + f64(first[1])
    assert_statistics(statistics(model, "norm_0"), (rows.mean(0), rows.var(0)))


def test_functional_model_with_two_inputs_and_shared_layers():
    keras.utils.set_random_seed(1)
    a, b = keras.Input((3,)), keras.Input((3,))
    dense = keras.layers.Dense(4)
    norms = [keras.layers.BatchNormalization() for _ in range(2)]
    added = norms[0](dense(a)) + norms[1](dense(b))
    model = keras.Model([a, b], added)
    frameworks.recompute_batch_stats(
        model, [(x, 2 * x) for x in BATCHES], inputs=lambda batch: ([*batch],)
    )
    kernel, bias = map(f64, weights(dense))
    for norm, factor in zip(norms, (1, 2), strict=True):
        rows = factor * f64(X) @ kernel + bias
        found = numpy([norm.moving_mean, norm.moving_variance])
        assert_statistics(found, (rows.mean(0), rows.var(0)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=None):
        return self.norm(self.dense(x), training=training)


class WithoutTraining(Subclassed):
    def call(self, x):  # type: ignore[override]
        return self.norm(self.dense(x))


def test_subclassed_models():
    model = Subclassed()
    model(BATCHES[0])
    frameworks.recompute_batch_stats(model, BATCHES)
    kernel, bias = map(f64, weights(model.dense))
    rows = f64(X) @ kernel + bias
    found = numpy([model.norm.moving_mean, model.norm.moving_variance])
    assert_statistics(found, (rows.mean(0), rows.var(0)))
    model = WithoutTraining()
    model(BATCHES[0])
    with pytest.raises(ValueError, match=r"call without the argument training, so"):
        frameworks.recompute_batch_stats(model, BATCHES)


def test_frozen_layers_and_keep():
    model = make()
    model.get_layer("norm_1").trainable = False
    before = statistics(model, "norm_1")
    with pytest.warns(UserWarning, match=r"no batch passed through.*norm_1"):
        frameworks.recompute_batch_stats(model, BATCHES)
    np.testing.assert_array_equal(statistics(model, "norm_1"), before)
    frameworks.recompute_batch_stats(model, BATCHES, keep="norm_1")
    np.testing.assert_array_equal(statistics(model, "norm_1"), before)
    model.get_layer("norm_1").trainable = True
    assert np.abs(statistics(model, "norm_0")[0]).max() > 0


def test_misuse_changes_nothing():
    model = make()
    before = bits(model.variables)
    with pytest.raises(ValueError, match="batches is empty"):
        frameworks.recompute_batch_stats(model, [])
    with pytest.raises(swa_jax.NonFiniteError, match=r"norm_0.*batch 2"):
        frameworks.recompute_batch_stats(model, [BATCHES[0], BATCHES[1] * np.nan])
    with pytest.raises(TypeError, match="one array of shape"):
        frameworks.recompute_batch_stats(model, X)
    with pytest.raises(ValueError, match=r"inputs='image'.*type tuple has no such"):
        frameworks.recompute_batch_stats(model, [(X, Y)], inputs="image")
    with pytest.raises(TypeError, match=r"keras\.Model, got Dense"):
        frameworks.recompute_batch_stats(model.layers[0], BATCHES)
    assert bits(model.variables) == before
    later = keras.Sequential([keras.layers.Dense(2)], name="later")
    with pytest.raises(ValueError, match=r"'later' is not built.*call it on"):
        frameworks.recompute_batch_stats(later, BATCHES)
    with pytest.raises(ValueError, match=r"no moving statistics"):
        frameworks.recompute_batch_stats(make(norms=False), BATCHES)
    spectral = keras.layers.SpectralNormalization(keras.layers.Dense(2))
    model = keras.Sequential([keras.Input((3,)), spectral])
    with pytest.raises(ValueError, match=r"SpectralNormalization.*in training only"):
        frameworks.recompute_batch_stats(model, BATCHES)


# The callback.


class History(keras.callbacks.Callback):
    """The weights after every batch, and those that validation sees."""

    def __init__(self):
        super().__init__()
        self.models, self.validated = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.models.append(numpy(self.model.trainable_variables))

    def on_test_batch_begin(self, batch, logs=None):
        self.validated.append(numpy(self.model.weights))


def fit(model, callbacks, epochs=3, **options):
    return model.fit(
        X,
        Y,
        batch_size=8,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=callbacks,
        **options,
    )


def mean_of(models):
    return [np.mean(f64(x), axis=0) for x in zip(*models, strict=True)]


def assert_close(got, expected):
    """Of a float32 running mean of a few numbers of order 1."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(f64(a), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "swa", "ema", "lawa"])
def test_averages_of_fit(name):
    average = {
        "mean": None,
        "swa": swa_jax.swa(start_step=6, period=2),
        "ema": swa_jax.ema(0.5, debias=False),
        "lawa": swa_jax.lawa(3),
    }[name]
    history, averaging = History(), frameworks.AverageWeights(average)
    model = compiled(make(norms=False))
    fit(model, [history, averaging])
    models = history.models
    assert len(models) == 3 * STEPS
    if name == "ema":
        wanted = [f64(x) for x in models[0]]
        for new in models[1:]:
            wanted = [a + 0.5 * (f64(b) - a) for a, b in zip(wanted, new, strict=True)]
    else:
        chosen = {"mean": models, "swa": models[5::2], "lawa": models[-3:]}[name]
        wanted = mean_of(chosen)
    assert_close(averaging.averaged_weights(), wanted)
    # The model keeps its own.
    assert bits(model.trainable_variables) == [x.tobytes() for x in models[-1]]


@pytest.mark.slow
def test_validation_sees_the_average_and_training_is_not_disturbed():
    data = {"validation_data": (X, Y), "validation_batch_size": 64}
    plain, model = (
        compiled(make(rate=0.5), momentum=0.9),
        compiled(make(rate=0.5), momentum=0.9),
    )
    keras.utils.set_random_seed(3)
    fit(plain, [], epochs=2, **data)
    keras.utils.set_random_seed(3)
    history = History()
    averaging = frameworks.AverageWeights(swa_jax.swa(STEPS + 1), batches=BATCHES)
    result = fit(model, [averaging, history], epochs=2, **data)
    assert bits(model.weights) == bits(plain.weights)
    assert bits(model.optimizer.variables) == bits(plain.optimizer.variables)
    trainable = {id(v) for v in model.trainable_variables}
    places = [i for i, v in enumerate(model.weights) if id(v) in trainable]
    seen = [[each[i] for i in places] for each in history.validated]
    # Nothing was averaged in the first epoch.
    assert_close(seen[0], [f64(x) for x in history.models[STEPS - 1]])
    assert_close(seen[1], mean_of(history.models[STEPS:]))
    # And val_loss is theirs.
    averaged = averaging.averaged_weights()
    for v, value in zip(model.trainable_variables, averaged, strict=True):
        v.assign(value)
    frameworks.recompute_batch_stats(model, BATCHES)
    loss = model.evaluate(X, Y, batch_size=64, verbose=0)
    np.testing.assert_allclose(loss, result.history["val_loss"][-1], rtol=1e-5)


@pytest.mark.slow
def test_batch_stats_of_the_average():
    history = History()
    averaging = frameworks.AverageWeights(
        leave_averaged=True, batches=lambda: [(x, x) for x in BATCHES]
    )
    model = compiled(make())
    fit(model, [averaging, history], validation_data=(X, Y))
    averaging.restore()  # as a next fit does: there is nothing to go back to
    assert_close(numpy(model.trainable_variables), mean_of(history.models))
    assert_net(model)
    # Validation had statistics of the averaged weights as well: the last are these.
    assert_close(history.validated[-1], [f64(v.value) for v in model.weights])


def test_leaves_the_model_alone_if_nothing_was_averaged():
    average = swa_jax.swa(start_step=1000)
    averaging = frameworks.AverageWeights(average, leave_averaged=True)
    history = History()
    model = compiled(make())
    with pytest.warns(UserWarning, match=r"nothing has been averaged in 5 optimizer"):
        fit(model, [averaging, history], epochs=1, validation_data=(X, Y))
    assert bits(model.trainable_variables) == [x.tobytes() for x in history.models[-1]]
    with pytest.raises(ValueError, match=r"nothing has been averaged.*start_step"):
        averaging.averaged_weights()


def test_micro_batches_are_no_updates():
    history, averaging = History(), frameworks.AverageWeights()
    model = compiled(make(norms=False), gradient_accumulation_steps=2)
    fit(model, [averaging, history], epochs=2)  # 10 batches, 5 updates
    assert averaging.num_averaged == 5
    assert_close(averaging.averaged_weights(), mean_of(history.models[1::2]))


@pytest.mark.parametrize("steps", [2, STEPS])
def test_steps_that_are_executed_together_are_one(steps):
    alone, history = History(), History()
    fit(compiled(make(norms=False)), [alone], epochs=2)
    model, averaging = make(norms=False), frameworks.AverageWeights()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, steps_per_execution=steps)
    fit(model, [averaging, history], epochs=2)
    ends = {2: [1, 3, 4], STEPS: [4]}[steps]  # of an epoch of five updates
    expected = [alone.models[epoch * STEPS + i] for epoch in range(2) for i in ends]
    assert averaging.num_averaged == len(expected)
    assert_close(averaging.averaged_weights(), mean_of(expected))


def test_a_second_fit_goes_on():
    history, averaging = History(), frameworks.AverageWeights()
    model = compiled(make(norms=False))
    for _ in range(2):
        fit(model, [averaging, history], epochs=1)
    assert averaging.num_averaged == 2 * STEPS
    assert_close(averaging.averaged_weights(), mean_of(history.models))


def test_a_failed_validation_leaves_the_model_to_training():
    class Failing(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise RuntimeError("validation fails")

    history, averaging = History(), frameworks.AverageWeights()
    model = compiled(make(norms=False))
    with pytest.raises(RuntimeError, match="validation fails"):
        fit(model, [averaging, history, Failing()], validation_data=(X, Y))
    averaging.restore()
    assert bits(model.trainable_variables) == [x.tobytes() for x in history.models[-1]]


def test_callback_misuse():
    with pytest.raises(TypeError, match=r"got function; call it: pass ema\(0\.999\)"):
        frameworks.AverageWeights(swa_jax.ema)
    with pytest.raises(TypeError, match=r"swa_jax's.*got float"):
        frameworks.AverageWeights(0.999)


# A loop of one's own.


@pytest.mark.parametrize("average", [None, swa_jax.ema(0.5, debias=False)])
def test_variables_of_a_model_may_be_averaged_as_they_are(average):
    model = make(norms=False)
    variables = model.trainable_variables
    state, models = swa_jax.init_average(variables, average), []
    for i in range(3):
        for v in variables:
            v.assign(np.array(v.value) + i)
        models.append([f64(x) for x in numpy(variables)])
        state = swa_jax.update_average(state, variables, average)
    if average is None:
        wanted = mean_of(models)
    else:
        wanted = [a / 4 + b / 4 + c / 2 for a, b, c in zip(*models, strict=True)]
    assert_close(swa_jax.averaged_params(state, variables), wanted)
