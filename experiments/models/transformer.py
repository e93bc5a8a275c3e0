"""A decoder-only Transformer that predicts the next token.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019: LayerNorm
before attention and before the dense layers, learned positions, GELU. LayerNorm has no
running statistics, so averaged weights need no pass over the data.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
        vocab_size: Number of tokens, and of logits.
        context: Longest row.
        layers: Number of blocks.
        heads: Attention heads of a block; they divide `width`.
        width: Features of a token.
        dropout: Share of activations dropped in training, which needs
            `rngs={"dropout": key}`.
        dtype: Dtype to compute in.
    """

    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Return logits [batch, length, vocab_size] of the tokens that follow.

        Args:
            tokens: [batch, length] integers; `length` is at most `context`.
            train: Whether to drop activations.

        Raises:
            ValueError: The rows are longer than `context`.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"tokens has rows of {length}; this network's context is"
                f" {self.context}. Cut the rows, or build it with a longer context."
            )
        tokens = tokens.astype(jnp.int32)
        embed = nn.Embed(
            self.vocab_size, self.width, dtype=self.dtype, embedding_init=_normal
        )
        positions = self.param("positions", _normal, (self.context, self.width))
        x = embed(tokens) + positions[None, :length].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        mask = nn.make_causal_mask(tokens)
        residual_init = nn.initializers.normal(0.02 / (2 * self.layers) ** 0.5)
        for _ in range(self.layers):
            x = _Block(self.heads, self.dropout, self.dtype, residual_init)(
                x, mask, train
            )
        x = nn.LayerNorm(dtype=self.dtype)(x).astype(jnp.float32)
        return nn.Dense(self.vocab_size, kernel_init=_normal)(x)
