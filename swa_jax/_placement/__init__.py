"""WHERE an average lives, and how arrays get there: one verb a thing.

===================  ==================================================================
``resolve``          what the argument ``sharding`` says, leaf by leaf
``stack, unstack``   a sharding for one more axis in front, or one less
``place``            to a sharding
``bring``            to a sharding's devices, without drawing the original along
``beside``           to where another array is
``follow``           a scalar, to the devices of another array
``meet``             weights, to the average that they enter
``to_host``          to host memory
``to_device``        back
``in_device_memory`` the same, also outside a trace
``as_array``         from NumPy, to any device
===================  ==================================================================
"""

from swa_jax._placement._barrier import stop_propagation as stop_propagation
from swa_jax._placement._kinds import devices_of as devices_of
from swa_jax._placement._kinds import is_hosted as is_hosted
from swa_jax._placement._kinds import is_placed as is_placed
from swa_jax._placement._kinds import is_traced as is_traced
from swa_jax._placement._kinds import unwrapped as unwrapped
from swa_jax._placement._meeting import is_scattered as is_scattered
from swa_jax._placement._meeting import meet as meet
from swa_jax._placement._meeting import together as together
from swa_jax._placement._moves import as_array as as_array
from swa_jax._placement._moves import beside as beside
from swa_jax._placement._moves import bring as bring
from swa_jax._placement._moves import follow as follow
from swa_jax._placement._moves import in_device_memory as in_device_memory
from swa_jax._placement._moves import place as place
from swa_jax._placement._moves import to_device as to_device
from swa_jax._placement._moves import to_host as to_host
from swa_jax._placement._targets import Targets as Targets
from swa_jax._placement._targets import resolve as resolve
from swa_jax._placement._targets import stack as stack
from swa_jax._placement._targets import unstack as unstack
