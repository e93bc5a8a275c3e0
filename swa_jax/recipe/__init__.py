"""The published method from its own hyperparameters, in optax and in a loop."""

from swa_jax.recipe._method import SWA as SWA
from swa_jax.recipe._state import Event as Event
from swa_jax.recipe._state import TrainingState as TrainingState
