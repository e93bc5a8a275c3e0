"""A network of Flax's nnx API, used like those of linen."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.common import NO_DATA, AxisName, Data, Dtype

PyTree = Any


class _Module(nnx.Module):
    """`ConvNet` with nnx: 3x3 convolutions, BatchNorm, ReLU, pooling, a dense head."""

    def __init__(self, settings: "NnxConvNet", channels: int, rngs: nnx.Rngs) -> None:
        dtype = settings.dtype
        convolutions, norms = [], []
        for width, stride in zip(settings.widths, settings.strides, strict=True):
            convolutions.append(
                nnx.Conv(
                    channels,
                    width,
                    (3, 3),
                    strides=stride,
                    use_bias=False,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            norms.append(
                nnx.BatchNorm(
                    width,
                    momentum=0.9,
                    dtype=dtype,
                    axis_name=settings.axis_name,
                    rngs=rngs,
                )
            )
            channels = width
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.head = nnx.Linear(channels, settings.data.num_classes, rngs=rngs)
        self.pixel_max = settings.data.pixel_max

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images.astype(jnp.float32) / self.pixel_max - 0.5
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x), use_running_average=not train))
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


@dataclasses.dataclass(frozen=True)
class NnxConvNet:
    """A small convolutional network with BatchNorm, written with nnx.

    `init` and `apply` make it look like a linen module, so that everything that trains
    those trains it: an nnx module is split into its graph, which is static, and its
    parameters and statistics, which are pytrees.

    Attributes:
        widths: Channels of each convolution.
        strides: Stride of each convolution.
        dtype: What it computes in; parameters and averages stay float32.
        data: What it is made for; inputs are scaled to [-0.5, 0.5].
        axis_name: Mapped axis over which BatchNorm averages its moments.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Dtype = "float32"
    data: Data = NO_DATA
    axis_name: AxisName = None

    def clone(self, **changes: Any) -> Self:
        """The same with other attributes, as linen modules have it."""
        return dataclasses.replace(self, **changes)

    def _make(self, inputs: jax.Array) -> Callable[[jax.Array], _Module]:
        return lambda key: _Module(self, inputs.shape[-1], nnx.Rngs(params=key))

    def init(self, key: jax.Array, inputs: jax.Array, train: bool) -> PyTree:
        """Draw parameters from `key`; return them and fresh statistics."""
        del train
        module = self._make(inputs)(key)
        params, batch_stats = nnx.state(module, nnx.Param, nnx.BatchStat)
        return {
            "params": nnx.to_pure_dict(params),
            "batch_stats": nnx.to_pure_dict(batch_stats),
        }

    def apply(
        self,
        variables: PyTree,
        inputs: jax.Array,
        train: bool,
        mutable: list[str] | None = None,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Any:
        """Return logits [batch, num_classes]; with `mutable` also new statistics."""
        del rngs  # nothing here is drawn
        module = nnx.eval_shape(self._make(inputs), jax.random.key(0))
        graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat)
        params, batch_stats = states
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(batch_stats, variables["batch_stats"])
        module = nnx.merge(graph, params, batch_stats, copy=True)
        logits = module(inputs, train)
        if not mutable:
            return logits
        updated = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return logits, {"batch_stats": updated}
