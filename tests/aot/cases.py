"""What is compiled: averaging on ResNet-50's parameters, by name.

A name reads step/layout/axes, as in "swa/fsdp/explicit". Nothing here holds an array:
shapes with shardings are all that a compiler needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import swa_jax
from swa_jax import _engine, _loop

from ..compiled import Report
from . import defects

Shapes = list[tuple[int, ...]]
Devices = Sequence[Any]
#: From a leaf's shape to where it lives.
Layout = Callable[[tuple[int, ...]], NamedSharding]


def resnet50_shapes() -> Shapes:
    """The 161 parameters of ResNet-50: kernels, and a scale and a bias of each norm."""
    shapes: Shapes = []

    def convolution(window: int, inputs: int, outputs: int) -> None:
        shapes.extend([(window, window, inputs, outputs), (outputs,), (outputs,)])

    convolution(7, 3, 64)
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            convolution(1, inputs, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            if block == 0:
                convolution(1, inputs, 4 * width)  # the shortcut's projection
            inputs = 4 * width
    return [*shapes, (inputs, 1000), (1000,)]


RESNET50 = resnet50_shapes()
#: The last bottleneck and the head, 6.5M parameters: enough where a defect shows in any
#: tree, and takes minutes to compile in the whole one.
TAIL = RESNET50[-11:]

SGD = optax.sgd(0.1, momentum=0.9)
SWA = optax.chain(SGD, swa_jax.swa(start_step=100, period=10))
COMPENSATED_SWA = optax.chain(SGD, swa_jax.swa(100, 10, compensated=True))
MEAN = functools.partial(swa_jax.swa, 100, 10)
EMA = functools.partial(swa_jax.ema, 0.999, 100, 10)
LAWA = functools.partial(swa_jax.lawa, 4, 100, 10)
SWAG = functools.partial(swa_jax.swag, 3, 100, 10)


def mesh_of(devices: Devices, axes: AxisType = AxisType.Auto) -> Mesh:
    """All devices in one axis."""
    return Mesh(np.array(devices), ("data",), axis_types=(axes,))


def replicated(mesh: Mesh) -> Layout:
    """A copy on each device."""
    return lambda shape: NamedSharding(mesh, PartitionSpec())


def fsdp(mesh: Mesh) -> Layout:
    """Every leaf split along its first axis that divides; ResNet-50's all have one."""

    def layout(shape: tuple[int, ...]) -> NamedSharding:
        axis = next((i for i, d in enumerate(shape) if d % mesh.size == 0), None)
        split = () if axis is None else (*[None] * axis, "data")
        return NamedSharding(mesh, PartitionSpec(*split))

    return layout


LAYOUTS = {"replicated": replicated, "fsdp": fsdp}


def placed(tree: Any, layout: Layout) -> Any:
    """``ShapeDtypeStruct``s of a tree, each where the layout says."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(x.shape)), tree
    )


def make_step(tx: Any) -> Callable[..., Any]:
    """What remains of a training step when its gradients are given."""

    def step(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def compile_step(
    devices: Devices,
    tx: Any,
    layout: str,
    axes: AxisType = AxisType.Auto,
    *,
    shapes: Shapes = RESNET50,
    dtype: Any = jnp.float32,
    donate: bool = True,
) -> Report:
    """The optimizer's whole step; parameters and state are reused."""
    where = LAYOUTS[layout](mesh_of(devices, axes))
    params = _params(shapes, dtype, where)
    opt_state = placed(jax.eval_shape(tx.init, params), where)
    compiled = (
        jax.jit(make_step(tx), donate_argnums=(0, 1) if donate else ())
        .lower(params, opt_state, params)
        .compile()
    )
    return Report.of(
        compiled,
        average=_one_model(opt_state[-1], params),
        donated=(params, opt_state),
        outputs=(params, opt_state),
    )


def _one_model(state: Any, params: Any) -> Any:
    """What counts as large: the mean, or where there is none the parameters."""
    stacked = isinstance(state, swa_jax.LAWAState)
    return params if stacked else getattr(state, "avg_params", params)


def compile_spread(
    devices: Devices,
    axes: AxisType,
    *,
    make: Callable[..., Any] = MEAN,
    shapes: Shapes = RESNET50,
) -> Report:
    """Parameters on every device, the average spread over them."""
    mesh = mesh_of(devices, axes)
    everywhere, spread = replicated(mesh), fsdp(mesh)
    params = _params(shapes, jnp.float32, everywhere)
    tx = optax.chain(SGD, make(sharding=lambda x: spread(x.shape)))
    momentum, average = jax.eval_shape(optax.chain(SGD, make()).init, params)
    counters, trees = average[:2], average[2:]
    average = type(average)(*placed(counters, everywhere), *placed(trees, spread))
    opt_state = (placed(momentum, everywhere), average)
    outputs = (params, opt_state)
    # Under Auto axes XLA chooses where outputs go; who trains pins them down.
    pinned = jax.tree.map(lambda x: x.sharding, outputs)
    compiled = (
        jax.jit(
            make_step(tx),
            donate_argnums=(0, 1),
            out_shardings=pinned if axes == AxisType.Auto else None,
        )
        .lower(params, opt_state, params)
        .compile()
    )
    return Report.of(
        compiled,
        average=_one_model(average, placed(params, spread)),
        donated=outputs,
        outputs=outputs,
    )


def compile_update(
    devices: Devices,
    layout: str,
    axes: AxisType = AxisType.Auto,
    *,
    average: str | None = None,
    memory_kind: str | None = None,
    shapes: Shapes = RESNET50,
    compensated: bool = False,
) -> Report:
    """``update_average``, as it is called from a loop; the state is reused.

    Args:
      devices: what to compile for.
      layout: of the parameters.
      axes: of the mesh.
      average: layout of the average, by default the parameters'.
      memory_kind: of the average.
      shapes: of the parameters.
      compensated: the average.
    """
    mesh = mesh_of(devices, axes)
    where, elsewhere = LAYOUTS[layout](mesh), LAYOUTS[average or layout](mesh)
    params = _params(shapes, jnp.float32, where)
    init = functools.partial(swa_jax.init_average, compensated=compensated)
    state = placed(jax.eval_shape(init, params), where)
    targets = None  # as update_average finds where both live alike
    if average or memory_kind:
        mean = placed(state.avg_params, _kept_in(memory_kind, elsewhere))
        state = state._replace(avg_params=mean)
        targets = tuple(x.sharding for x in jax.tree.leaves(mean))
    # Not through the public name: jitted around it, it would be our donation, not its.
    plan = _loop._equal_mean(compensated).plan
    compiled = _loop._update_in_place.lower(
        state, params, targets, None, dataclasses.replace(plan, sharding=None)
    ).compile()
    return Report.of(compiled, average=state.avg_params, donated=state, outputs=state)


def compile_rush(devices: Devices) -> Report:
    """``update_average`` in host memory, whose leaves do not wait for each other."""
    with mock.patch.object(_engine, "_IN_FLIGHT", len(TAIL)):
        return compile_update(
            devices, "replicated", memory_kind="pinned_host", shapes=TAIL
        )


def _kept_in(memory_kind: str | None, layout: Layout) -> Layout:
    if memory_kind is None:
        return layout
    return lambda shape: layout(shape).with_memory_kind(memory_kind)


def _params(shapes: Shapes, dtype: Any, where: Layout) -> dict[str, Any]:
    return placed(
        {f"{i:03}": jax.ShapeDtypeStruct(s, dtype) for i, s in enumerate(shapes)}, where
    )


def compile_training(devices: Devices, tx: Any = SWA) -> Report:
    """ResNet-50's training step, data parallel, 256 images in bfloat16."""
    from experiments.models.resnet import IMAGENET, STAGES, ResNet

    mesh = mesh_of(devices)
    everywhere = replicated(mesh)
    model = ResNet(STAGES[50], dtype="bfloat16", data=IMAGENET)
    tx = optax.chain(optax.add_decayed_weights(1e-4), tx)

    def batch(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        split = NamedSharding(mesh, PartitionSpec("data"))
        return jax.ShapeDtypeStruct((256, *shape), dtype, sharding=split)

    images, labels = batch((224, 224, 3), jnp.bfloat16), batch((), jnp.int32)

    def step(params: Any, batch_stats: Any, opt_state: Any, x: Any, y: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, new["batch_stats"]

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, loss

    init = functools.partial(model.init, train=False)
    variables = placed(jax.eval_shape(init, jax.random.key(0), images), everywhere)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = placed(jax.eval_shape(tx.init, params), everywhere)
    donated = (params, batch_stats, opt_state)
    compiled = (
        jax.jit(step, donate_argnums=(0, 1, 2))
        .lower(*donated, images, labels)
        .compile()
    )
    return Report.of(
        compiled,
        average=swa_jax.swa_state(opt_state).avg_params,
        donated=donated,
        outputs=(*donated, None),
    )


def _steps() -> dict[str, Callable[[Devices], Report]]:
    cases: dict[str, Callable[[Devices], Report]] = {}
    for layout in LAYOUTS:
        step = functools.partial(compile_step, layout=layout)
        auto, explicit = AxisType.Auto, AxisType.Explicit
        cases |= {
            f"sgd/{layout}/auto": functools.partial(step, tx=SGD, axes=auto),
            f"swa/{layout}/auto": functools.partial(step, tx=SWA, axes=auto),
            f"swa/{layout}/explicit": functools.partial(step, tx=SWA, axes=explicit),
            f"swa bfloat16/{layout}/auto": functools.partial(
                step, tx=SWA, dtype=jnp.bfloat16
            ),
            f"update_average/{layout}/auto": functools.partial(
                compile_update, layout=layout
            ),
        }
    return cases


def _defects() -> dict[str, Callable[[Devices], Report]]:
    def chained(defect: Any, layout: str = "replicated", **kwargs: Any) -> Any:
        tx = optax.chain(SGD, defect)
        return functools.partial(compile_step, tx=tx, layout=layout, **kwargs)

    return {
        "branching/replicated/auto": chained(defects.branching),
        "branching window/replicated/auto": chained(
            defects.branching_window, shapes=TAIL
        ),
        "lagging/replicated/auto": chained(defects.lagging),
        "concatenated/replicated/auto": chained(defects.concatenated, shapes=TAIL),
        "concatenated/fsdp/auto": chained(defects.concatenated, "fsdp", shapes=TAIL),
        "not donated/replicated/auto": functools.partial(
            compile_step, tx=SWA, layout="replicated", shapes=TAIL, donate=False
        ),
    }


#: What must keep every promise.
STEPS = _steps()
#: What keeps them with one more buffer, a compensation as large as the average.
COMPENSATED = {
    "swa compensated/replicated/auto": functools.partial(
        compile_step, tx=COMPENSATED_SWA, layout="replicated"
    ),
    "swa compensated/fsdp/explicit": functools.partial(
        compile_step, tx=COMPENSATED_SWA, layout="fsdp", axes=AxisType.Explicit
    ),
    "swa compensated bfloat16/fsdp/auto": functools.partial(
        compile_step,
        tx=COMPENSATED_SWA,
        layout="fsdp",
        dtype=jnp.bfloat16,
    ),
    "update_average compensated/replicated/auto": functools.partial(
        compile_update, layout="replicated", compensated=True
    ),
}
#: The other averages, on a tree that is compiled in seconds.
AVERAGES = {
    f"{name}/{layout}/{axes.name.lower()}": functools.partial(
        compile_step,
        tx=optax.chain(SGD, make()),
        layout=layout,
        axes=axes,
        shapes=TAIL,
        dtype=jnp.bfloat16 if "bfloat16" in name else jnp.float32,
    )
    for name, make, layout, axes in (
        ("ema", EMA, "replicated", AxisType.Auto),
        ("ema", EMA, "fsdp", AxisType.Explicit),
        ("lawa", LAWA, "replicated", AxisType.Auto),
        ("lawa", LAWA, "fsdp", AxisType.Explicit),
        ("lawa bfloat16", LAWA, "replicated", AxisType.Auto),
        ("lawa bfloat16", LAWA, "fsdp", AxisType.Explicit),
        ("swag", SWAG, "replicated", AxisType.Auto),
        ("swag", SWAG, "fsdp", AxisType.Explicit),
        ("swag", SWAG, "fsdp", AxisType.Auto),
    )
}
AVERAGES |= {
    f"lawa spread/replicated/{axes.name.lower()}": functools.partial(
        compile_spread, axes=axes, make=LAWA, shapes=TAIL
    )
    for axes in (AxisType.Explicit, AxisType.Auto)
}
#: Averages placed elsewhere than the parameters.
_SPREADING: dict[str, Callable[..., Report]] = {
    "spread": compile_spread,
    "update_average spread": functools.partial(
        compile_update, layout="replicated", average="fsdp"
    ),
}
SPREAD = {
    f"{what}/replicated/{axes.name.lower()}": functools.partial(compiler, axes=axes)
    for axes in (AxisType.Explicit, AxisType.Auto)
    for what, compiler in _SPREADING.items()
}
#: Averages in host memory, beside the parameters and spread.
HOSTED = {
    f"{what}/{layout}/{axes.name.lower()}": functools.partial(
        compile_update,
        layout=layout,
        axes=axes,
        average=average,
        memory_kind="pinned_host",
    )
    for what, layout, average, axes in (
        ("update_average hosted", "replicated", None, AxisType.Auto),
        ("update_average hosted", "fsdp", None, AxisType.Auto),
        ("update_average hosted spread", "replicated", "fsdp", AxisType.Auto),
        ("update_average hosted spread", "replicated", "fsdp", AxisType.Explicit),
    )
}
#: What breaks the limit on these.
HOSTED_DEFECTS = {"rush hosted/replicated/auto": compile_rush}
#: What looks at all weights, on all devices, before it averages them.
NONFINITE = {
    "swa skip_nonfinite/fsdp/auto": functools.partial(
        compile_step,
        tx=optax.chain(SGD, swa_jax.swa(100, 10, skip_nonfinite=True)),
        layout="fsdp",
        shapes=TAIL,
    )
}
#: What must break one.
DEFECTS = _defects()
#: Minutes to compile, and for four chips.
TRAINING = {"training/replicated/auto": compile_training}
