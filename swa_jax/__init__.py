"""Averages of weights for JAX: SWA, EMA and their kin, as Optax transformations."""

from swa_jax import typing as typing
from swa_jax._diagnostics import average_distance as average_distance
from swa_jax._diagnostics import averaging_weights as averaging_weights
from swa_jax._diagnostics import effective_window as effective_window
from swa_jax._diagnostics import models_in_average as models_in_average
from swa_jax._drawing import swag_sample as swag_sample
from swa_jax._finding import average_state as average_state
from swa_jax._finding import swa_state as swa_state
from swa_jax._loop import averaged_with as averaged_with
from swa_jax._loop import init_average as init_average
from swa_jax._loop import update_average as update_average
from swa_jax._reading import averaged_params as averaged_params
from swa_jax._reading import swa_params as swa_params
from swa_jax._reading import with_num_updates as with_num_updates
from swa_jax.averages.checkpoints import average_checkpoints as average_checkpoints
from swa_jax.averages.ema import EMAState as EMAState
from swa_jax.averages.ema import PowerEMAState as PowerEMAState
from swa_jax.averages.ema import ema as ema
from swa_jax.averages.ema import ema_warmup as ema_warmup
from swa_jax.averages.ema import power_ema as power_ema
from swa_jax.averages.lawa import LAWAState as LAWAState
from swa_jax.averages.lawa import lawa as lawa
from swa_jax.averages.posthoc import Snapshot as Snapshot
from swa_jax.averages.posthoc import posthoc_ema as posthoc_ema
from swa_jax.averages.soups import decay_weights as decay_weights
from swa_jax.averages.soups import greedy_soup as greedy_soup
from swa_jax.averages.soups import soup as soup
from swa_jax.averages.swa import CompensatedSWAState as CompensatedSWAState
from swa_jax.averages.swa import SWAState as SWAState
from swa_jax.averages.swa import swa as swa
from swa_jax.averages.swag import SWAGState as SWAGState
from swa_jax.averages.swag import swag as swag
from swa_jax.averages.with_batch_stats import with_batch_stats as with_batch_stats
from swa_jax.batch_stats import recompute_batch_stats as recompute_batch_stats
from swa_jax.errors import CheckpointError as CheckpointError
from swa_jax.errors import NonFiniteError as NonFiniteError
from swa_jax.recipe import SWA as SWA
from swa_jax.recipe import Event as Event
from swa_jax.recipe import TrainingState as TrainingState
from swa_jax.schedules import cosine_to_constant_schedule as cosine_to_constant_schedule
from swa_jax.schedules import cyclic_schedule as cyclic_schedule
from swa_jax.schedules import linear_to_constant_schedule as linear_to_constant_schedule
from swa_jax.schedules import swa_schedule as swa_schedule

__version__ = "0.2.0"

__all__ = [
    "SWA",
    "CheckpointError",
    "CompensatedSWAState",
    "EMAState",
    "Event",
    "LAWAState",
    "NonFiniteError",
    "PowerEMAState",
    "SWAGState",
    "SWAState",
    "Snapshot",
    "TrainingState",
    "average_checkpoints",
    "average_distance",
    "average_state",
    "averaged_params",
    "averaged_with",
    "averaging_weights",
    "cosine_to_constant_schedule",
    "cyclic_schedule",
    "decay_weights",
    "effective_window",
    "ema",
    "ema_warmup",
    "greedy_soup",
    "init_average",
    "lawa",
    "linear_to_constant_schedule",
    "models_in_average",
    "posthoc_ema",
    "power_ema",
    "recompute_batch_stats",
    "soup",
    "swa",
    "swa_params",
    "swa_schedule",
    "swa_state",
    "swag",
    "swag_sample",
    "update_average",
    "with_batch_stats",
    "with_num_updates",
]
