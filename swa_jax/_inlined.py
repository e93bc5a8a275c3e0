"""Small functions that are compiled by themselves where nothing around them is."""

import functools

import jax

#: Compiled also where the caller is not: the constants within are then no transfers
#: from the host. Inside a trace such functions leave no mark.
inlined = functools.partial(jax.jit, inline=True)
