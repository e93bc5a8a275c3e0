"""Batch statistics of Keras's models, and a callback that averages their weights.

For Keras 3 on JAX: set ``KERAS_BACKEND=jax`` in the environment before the first import
of ``keras``, or import this module first.
"""

import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

os.environ.setdefault("KERAS_BACKEND", "jax")  # read by Keras once, and kept

import keras
import numpy as np
import optax

import swa_jax
from swa_jax.batch_stats._batches import check_batches
from swa_jax.frameworks._inputs import arguments_of, check_inputs
from swa_jax.frameworks._kept import kept, weak
from swa_jax.typing import BatchStatsFn, BatchWeight, Inputs, Keep, Mode, PyTree

if keras.backend.backend() != "jax":
    raise ImportError(
        "swa_jax.frameworks.keras needs Keras's JAX backend, got "
        f"{keras.backend.backend()!r}; set os.environ['KERAS_BACKEND'] = 'jax' before "
        "the first import of keras"
    )
#: How the names of running statistics begin.
_STATISTICS = ("moving_", "renorm_")
#: Beside the statistics: seeds and other integers, by their places.
_COUNTERS = "(counters)"


def recompute_batch_stats(
    model: keras.Model,
    batches: Iterable[PyTree],
    *,
    inputs: Inputs = None,
    mode: Mode = "pooled",
    keep: Keep = None,
    pairs: Mapping[str, str] | None = None,
    batch_weight: BatchWeight | None = None,
) -> None:
    """Sets the statistics of ``BatchNormalization`` to those of the weights, in place.

    The model runs with ``training=True``, so Dropout drops, each batch otherwise. Only
    variables called ``moving_...`` change; weights, seeds, optimizer and metrics stay,
    and after an error all does. Layers with ``trainable=False`` run in inference and
    keep their statistics; a warning names them.

    Args:
      model: built, with the weights that it is to be evaluated with.
      batches: see ``swa_jax.recompute_batch_stats``, like all that follows ``inputs``.
      inputs: what the model is called with: a key or index of the batch, or a function
        from the batch to the input (a tuple is several arguments). By default as
        ``fit`` reads its data: ``x`` of a tuple ``(x, y)`` or ``(x, y, weights)``, else
        the batch.
      mode: how batches are combined.
      keep: statistics that stay as they are, by name, such as ``"batch_normalization"``
        or ``"batch_normalization/moving_mean"``.
      pairs: names of variances with those of their means.
      batch_weight: how much a batch counts.

    Raises:
      TypeError: ``model`` is no Keras model; ``inputs`` is none of the above.
      ValueError: a model that is not built, has no moving statistics, has
        ``SpectralNormalization``, or whose ``call`` has no argument ``training``; see
        ``swa_jax.recompute_batch_stats`` for the rest.

    Example:
      >>> import jax.numpy as jnp, keras
      >>> norm = keras.layers.BatchNormalization()
      >>> model = keras.Sequential([keras.Input((1,)), norm])
      >>> batches = [jnp.arange(4.0)[:, None], jnp.array([[10.0], [14.0]])]
      >>> recompute_batch_stats(model, batches)
      >>> print(f"{norm.moving_mean[0]:.2f} {norm.moving_variance[0]:.2f}")
      5.00 26.67
    """
    _check_model(model)
    check_inputs(inputs)
    check_batches(batches)
    _recompute(
        model,
        batches,
        inputs,
        mode=mode,
        keep=keep,
        pairs=pairs,
        batch_weight=batch_weight,
    )


def _check_model(model: Any) -> None:
    """Raises unless statistics of the model can be recomputed."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"model must be a keras.Model, got {type(model).__name__}; pass the model "
            "itself (one layer as keras.Sequential([layer]))"
        )
    if not model.built:
        raise ValueError(
            f"model {model.name!r} is not built, so it has no weights yet; call it on "
            "a batch, or load its weights"
        )
    if "training" not in inspect.signature(model.call).parameters:
        raise ValueError(
            f"model {model.name!r} has a call without the argument training, so its "
            "layers run in inference, in fit as well; write call(self, inputs, "
            "training=None) and hand training on to BatchNormalization"
        )
    for variable in model.non_trainable_variables:
        if variable.name == "vector_u":
            raise ValueError(
                f"model has SpectralNormalization, {variable.path!r}, which normalises "
                "its weights in training only, so statistics from a pass in training "
                "mode would not fit inference; build the model for inference from the "
                "layers that it wraps, with weights divided by their norms"
            )
    if not _statistics(model.non_trainable_variables):
        raise ValueError(
            f"model {model.name!r} has no moving statistics, such as those of "
            "BatchNormalization, to recompute; it needs no pass"
        )


def _recompute(
    model: keras.Model, batches: Iterable[PyTree], inputs: Inputs, **options: Any
) -> None:
    variables = model.non_trainable_variables
    values = [v.value for v in variables]
    frozen = [not layer.trainable for layer in model._flatten_layers()]

    def make() -> BatchStatsFn:
        return functools.partial(_run, weakref.ref(model), weak(inputs))

    recomputed = swa_jax.recompute_batch_stats(
        kept(model, (weak(inputs), frozen), make),
        ([v.value for v in model.trainable_variables], values),
        _state_of(variables, values),
        map(_as_arrays, batches),
        **options,
    )
    for layer, names in _statistics(variables).items():
        for name, i in names.items():
            variables[i].assign(recomputed[layer][name])


def _run(
    find: Callable[[], keras.Model | None],
    inputs: Callable[[], Inputs],
    params: PyTree,
    state: PyTree,
    batch: PyTree,
) -> PyTree:
    """From the values of all variables, and what ``_state_of`` made of them before."""
    model: Any = find()
    trainable, others = params
    variables = model.non_trainable_variables
    filled = list(others)
    for i, value in state[_COUNTERS].items():
        filled[i] = value
    for layer, names in _statistics(variables).items():
        for name, i in names.items():
            filled[i] = state[layer][name]
    _, new = model.stateless_call(
        trainable, filled, *_arguments(batch, inputs()), training=True
    )
    return _state_of(variables, new)


def _state_of(variables: list[Any], values: list[Any]) -> dict[str, dict[Any, Any]]:
    """Running statistics by layer and name, and all integers by their places."""
    # Seeds go on from batch to batch, so that each draws otherwise.
    counters = {
        i: value
        for i, value in enumerate(values)
        if not jnp.issubdtype(value.dtype, jnp.inexact)
    }
    statistics: dict[str, dict[Any, Any]] = {
        layer: {name: values[i] for name, i in names.items()}
        for layer, names in _statistics(variables).items()
    }
    return {**statistics, _COUNTERS: counters}


def _statistics(variables: list[Any]) -> dict[str, dict[str, int]]:
    """The places of running statistics, by the path of their layer and their name."""
    places: dict[str, dict[str, int]] = {}
    for i, variable in enumerate(variables):
        if variable.name.startswith(_STATISTICS):
            layer = base = variable.path.rpartition("/")[0] or "model"
            copies = 1
            while variable.name in places.get(layer, {}):  # layers of the same name
                copies += 1
                layer = f"{base}#{copies}"
            places.setdefault(layer, {})[variable.name] = i
    return places


def _arguments(batch: PyTree, inputs: Inputs) -> tuple[Any, ...]:
    if inputs is None and isinstance(batch, tuple):
        return (keras.utils.unpack_x_y_sample_weight(batch)[0],)
    return arguments_of(batch, inputs)


def _as_arrays(batch: PyTree) -> PyTree:
    """Tensors of other libraries, as datasets yield them, as NumPy's."""

    def one(x: Any) -> Any:
        known = isinstance(x, jax.Array | np.ndarray | np.generic | int | float)
        return x if known else np.asarray(x)

    return jax.tree.map(one, batch)


class AverageWeights(keras.callbacks.Callback):
    """Averages the trainable weights while ``model.fit`` trains.

    The average takes the weights after every update of the optimizer (a batch, or
    every ``gradient_accumulation_steps`` batches; with ``steps_per_execution`` it sees
    the last of each group). ``start_step`` and ``period`` of ``swa_jax.swa`` and its
    kin count these. Validation inside ``fit`` runs with the average, as soon as there
    is one, and training goes on from its own weights, bit for bit: so ``val_loss`` is
    the average's, while callbacks that save the model at the end of an epoch save the
    weights of training. A second ``fit`` goes on with the same average.

    Attributes:
      state: of the average, ``None`` before training; see ``swa_jax.averaged_params``.

    Example:
      >>> import keras, numpy as np, swa_jax
      >>> dense = keras.layers.Dense(1, use_bias=False)
      >>> model = keras.Sequential([keras.Input((1,)), dense])
      >>> model.compile("sgd", "mse")
      >>> averaging = AverageWeights(swa_jax.ema(0.9), leave_averaged=True)
      >>> x, y = np.ones((8, 1)), np.zeros((8, 1))
      >>> history = model.fit(x, y, 2, callbacks=[averaging], verbose=0)
      >>> averaging.num_averaged
      4
    """

    def __init__(
        self,
        average: optax.GradientTransformationExtraArgs | None = None,
        *,
        leave_averaged: bool = False,
        batches: Callable[[], Iterable[PyTree]] | Iterable[PyTree] | None = None,
    ) -> None:
        """Prepares an average.

        Args:
          average: ``swa_jax.ema(0.999)``, ``swa_jax.swa(start_step)`` or any other of
            them; ``None`` for the mean over all updates.
          leave_averaged: leave the averaged weights in the model at the end of ``fit``.
            If nothing was averaged by then, its own stay, with a warning.
          batches: data for ``recompute_batch_stats``, if the model has moving
            statistics: a list, or a function that returns an iterable. Then averaged
            weights are validated, and left, with statistics of their own; else with
            those of the weights of training.

        Raises:
          TypeError: ``average`` is none of the averages.
        """
        super().__init__()
        if average is not None and not hasattr(average, "update"):
            raise TypeError(
                "average must be one of swa_jax's, such as swa_jax.ema(0.999), or None "
                f"for the mean, got {type(average).__name__}; call it: pass "
                "ema(0.999), not ema"
            )
        self.average = average
        self.leave_averaged = leave_averaged
        self.batches = batches
        self.state: Any = None
        self._trained: list[tuple[Any, jax.Array]] = []  # variables and values
        self._updates = 0

    @property
    def num_averaged(self) -> int:
        """Models in the average so far."""
        return 0 if self.state is None else int(self.state.num_averaged)

    def averaged_weights(self) -> list[jax.Array]:
        """The average, in the order of ``model.trainable_variables``.

        Raises:
          ValueError: nothing has been averaged.
        """
        if not self.num_averaged:
            raise ValueError(
                "AverageWeights: nothing has been averaged, num_averaged is 0; train "
                "with this callback up to start_step, which counts optimizer updates"
            )
        return swa_jax.averaged_params(self.state, _values(self.model))

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins the average, or goes on with it."""
        self.restore()
        if self.state is None:
            self.state = swa_jax.init_average(_values(self.model), self.average)
        self._updates = self._updates_made()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Makes sure of training's own weights, also after a failed validation."""
        self.restore()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Averages, if the weights were updated."""
        if self._accumulates():
            updates = self._updates_made()
            if updates == self._updates:
                return
            self._updates = updates
        self.state = swa_jax.update_average(
            self.state, _values(self.model), self.average
        )

    def on_test_begin(self, logs: Any = None) -> None:
        """Puts the average into the model."""
        self.restore()
        if self.num_averaged:
            self._put_average()

    def on_test_end(self, logs: Any = None) -> None:
        """Puts training's own weights back."""
        self.restore()

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the model with its own weights, or with the average."""
        self.restore()
        if not self.leave_averaged:
            return
        if not self.num_averaged:
            warnings.warn(
                "AverageWeights: leave_averaged=True, but nothing has been averaged "
                f"in {int(self.state.num_updates)} optimizer updates, so the model "
                "keeps its own weights; give the average an earlier start_step",
                stacklevel=2,
            )
            return
        self._put_average()
        self._trained = []

    def _put_average(self) -> None:
        model = self.model
        averaged = self.averaged_weights()
        pairs = list(zip(model.trainable_variables, averaged, strict=True))
        self._trained = [(v, v.value) for v, _ in pairs]
        # Copies: evaluation donates what is in the model.
        others = model.non_trainable_weights
        self._trained += [(v, jnp.copy(v.value)) for v in others]
        try:
            for variable, value in pairs:
                variable.assign(value)
            if self.batches is not None:
                self._recompute(model)
        except BaseException:
            self.restore()
            raise

    def _recompute(self, model: keras.Model) -> None:
        batches: Any = self.batches() if callable(self.batches) else self.batches
        _check_model(model)
        check_batches(batches)
        _recompute(model, batches, None)

    def restore(self) -> None:
        """Puts training's own weights back, after a validation that failed."""
        trained, self._trained = self._trained, []
        # Asked for the model, Keras first puts what is on the devices into it.
        if trained and self.model is not None:
            for variable, value in trained:
                variable.assign(value)

    def _accumulates(self) -> bool:
        optimizer = self._model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)  # of loss scaling
        return bool(getattr(inner, "gradient_accumulation_steps", None))

    def _updates_made(self) -> int:
        optimizer = self.model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        return int(inner.iterations) if self._accumulates() else 0


def _values(model: keras.Model) -> list[jax.Array]:
    return [v.value for v in model.trainable_variables]
