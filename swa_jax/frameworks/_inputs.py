"""Which part of a batch a model is called with."""

from typing import Any

from swa_jax.typing import Inputs, PyTree


def check_inputs(inputs: Any) -> None:
    """Raises unless ``inputs`` says what a model is called with."""
    plain = isinstance(inputs, str | int) and not isinstance(inputs, bool)
    if inputs is not None and not plain and not callable(inputs):
        raise TypeError(
            "inputs must be a key or an index of the batch, as in 'image' or 0, or a "
            f"function from the batch to the model's input, got {inputs!r:.80}; leave "
            "it out if the batch is the input"
        )


def arguments_of(batch: PyTree, inputs: Inputs) -> tuple[Any, ...]:
    """What the model is called with for this batch.

    Raises:
      ValueError: the batch has no such key or index.
    """
    if inputs is None:
        return (batch,)
    if callable(inputs):
        found = inputs(batch)
        return found if isinstance(found, tuple) else (found,)
    try:
        return (batch[inputs],)
    except (KeyError, IndexError, TypeError) as error:
        has = f"the keys {list(batch)}" if isinstance(batch, dict) else "no such part"
        raise ValueError(
            f"inputs={inputs!r} is the key or index of the model's input in a batch, "
            f"but a batch of type {type(batch).__name__} has {has}; name another, or "
            "pass a function from the batch to the input"
        ) from error
