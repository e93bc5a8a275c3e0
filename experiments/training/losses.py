"""The training loss: cross-entropy, with label smoothing and MixUp.

MixUp (Zhang et al., arXiv:1710.09412): inputs and targets are mixed with those of a
partner by the same weight. Label smoothing (Szegedy et al., arXiv:1512.00567) is
optax's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def mixed_inputs(batch: Mapping[str, Any]) -> Any:
    """What the network sees: `inputs`, mixed with their partners if there are any.

    Args:
        batch: `inputs` [batch, ...]; under MixUp also `partner_inputs` of that shape
            and `mix` [batch] float32, the weight of `inputs`.

    Returns:
        `inputs` as they are, or mixed, float32.
    """
    inputs = batch["inputs"]
    if "mix" not in batch:
        return inputs
    mix = batch["mix"].reshape(-1, *(1,) * (inputs.ndim - 1))
    partners = batch["partner_inputs"].astype(jnp.float32)
    return mix * inputs.astype(jnp.float32) + (1 - mix) * partners


def mean_loss(
    logits: jax.Array, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> jax.Array:
    """Mean cross-entropy over all labels of the batch, in nats; [] float32.

    Args:
        logits: [*labels.shape, classes] float32.
        batch: `labels`; under MixUp also `partner_labels` and `mix` [batch].
        label_smoothing: Share of each target spread evenly over all classes.
    """

    def losses_of(labels: Any) -> jax.Array:
        if not label_smoothing:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    losses = losses_of(batch["labels"])
    if "mix" in batch:
        mix = batch["mix"].reshape(-1, *(1,) * (losses.ndim - 1))
        losses = mix * losses + (1 - mix) * losses_of(batch["partner_labels"])
    return jnp.mean(losses)
