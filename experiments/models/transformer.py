"""A decoder-only Transformer that predicts the next token.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019: LayerNorm
before attention and before the dense layers, learned positions, GELU. LayerNorm has no
running statistics, so averaged weights need no pass over the data.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.common import NO_DATA, AxisName, Data, Dtype
from experiments.runtime.checks import AT_LEAST_1, SHARE, check, check_settings

_normal = nn.initializers.normal(0.02)


class _Block(nn.Module):
    """Causal attention and two dense layers, each added to its input."""

    heads: int
    dropout: float
    dtype: Any
    # Layers that add to the stream start smaller, so that its variance stays.
    residual_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            kernel_init=_normal,
            out_kernel_init=self.residual_init,
            dropout_rate=self.dropout,
            deterministic=not train,
        )(y, mask=mask)
        x = x + drop(y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, kernel_init=_normal)(y))
        y = nn.Dense(width, dtype=self.dtype, kernel_init=self.residual_init)(y)
        return x + drop(y)


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a dense head.

    Attributes:
        layers: Number of blocks.
        heads: Attention heads of a block; they divide `width`.
        width: Features of a token.
        dropout: Share of activations dropped in training, which needs
            `rngs={"dropout": key}`.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for: the number of tokens, and the longest row.
        axis_name: Unused: nothing here is synchronised.
    """

    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    dtype: Dtype = "float32"
    data: Data = NO_DATA
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        """Reject sizes that do not fit together."""
        check_settings(self, AT_LEAST_1, "layers", "heads", "width")
        check_settings(self, SHARE, "dropout")
        check(
            self.width % self.heads == 0,
            f"width is {self.width} with heads={self.heads}; each head takes an"
            " equal part of the features.",
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, length, vocab_size] of the tokens that follow.

        Args:
            tokens: [batch, length] integers; `length` is at most `context`.
            train: Whether to drop activations.

        Raises:
            ValueError: The rows are longer than `context`.
        """
        (context,), vocabulary = self.data.shape, self.data.num_classes
        length = tokens.shape[1]
        if length > context:
            raise ValueError(
                f"tokens has rows of {length}; this network's context is"
                f" {context}. Cut the rows, or build it with a longer context."
            )
        tokens = tokens.astype(jnp.int32)
        embed = nn.Embed(
            vocabulary, self.width, dtype=self.dtype, embedding_init=_normal
        )
        positions = self.param("positions", _normal, (context, self.width))
        x = embed(tokens) + positions[None, :length].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        mask = nn.make_causal_mask(tokens)
        residual_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
        for _ in range(self.layers):
            x = _Block(self.heads, self.dropout, self.dtype, residual_init)(
                x, mask, train
            )
        x = nn.LayerNorm(dtype=self.dtype)(x).astype(jnp.float32)
        return nn.Dense(vocabulary, kernel_init=_normal)(x)
