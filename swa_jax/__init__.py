"""Stochastic Weight Averaging (SWA) for JAX, as an Optax gradient transformation."""

from swa_jax import typing as typing
from swa_jax._finding import average_state as average_state
from swa_jax._finding import swa_state as swa_state
from swa_jax._loop import averaged_with as averaged_with
from swa_jax._loop import init_average as init_average
from swa_jax._loop import update_average as update_average
from swa_jax._reading import averaged_params as averaged_params
from swa_jax._reading import swa_params as swa_params
from swa_jax._reading import with_num_updates as with_num_updates
from swa_jax.averages.ema import EMAState as EMAState
from swa_jax.averages.ema import PowerEMAState as PowerEMAState
from swa_jax.averages.ema import ema as ema
from swa_jax.averages.ema import ema_warmup as ema_warmup
from swa_jax.averages.ema import power_ema as power_ema
from swa_jax.averages.lawa import LAWAState as LAWAState
from swa_jax.averages.lawa import lawa as lawa
from swa_jax.averages.swa import CompensatedSWAState as CompensatedSWAState
from swa_jax.averages.swa import SWAState as SWAState
from swa_jax.averages.swa import swa as swa
from swa_jax.averages.swag import SWAGState as SWAGState
from swa_jax.averages.swag import swag as swag
from swa_jax.batch_stats import recompute_batch_stats as recompute_batch_stats
from swa_jax.errors import NonFiniteError as NonFiniteError
from swa_jax.recipe import SWA as SWA
from swa_jax.recipe import Event as Event
from swa_jax.recipe import TrainingState as TrainingState
from swa_jax.schedules import cosine_to_constant_schedule as cosine_to_constant_schedule
from swa_jax.schedules import cyclic_schedule as cyclic_schedule
from swa_jax.schedules import linear_to_constant_schedule as linear_to_constant_schedule
from swa_jax.schedules import swa_schedule as swa_schedule

__version__ = "0.1.0"

__all__ = [
    "SWA",
    "CompensatedSWAState",
    "EMAState",
    "Event",
    "LAWAState",
    "NonFiniteError",
    "PowerEMAState",
    "SWAGState",
    "SWAState",
    "TrainingState",
    "average_state",
    "averaged_params",
    "averaged_with",
    "cosine_to_constant_schedule",
    "cyclic_schedule",
    "ema",
    "ema_warmup",
    "init_average",
    "lawa",
    "linear_to_constant_schedule",
    "power_ema",
    "recompute_batch_stats",
    "swa",
    "swa_params",
    "swa_schedule",
    "swa_state",
    "swag",
    "typing",
    "update_average",
    "with_num_updates",
]
