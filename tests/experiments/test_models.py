import jax
import numpy as np
import pytest

from experiments.data.dataset import Inputs
from experiments.models.convnet import ConvNet

STRIDES = (1, 2, 2)


def convolve(x, kernel, stride):
    """A 3x3 convolution with TensorFlow's SAME padding, in NumPy."""
    height, width = x.shape[1:3]
    out = -(-height // stride), -(-width // stride)
    totals = [(n - 1) * stride + 3 - m for n, m in zip(out, x.shape[1:3], strict=True)]
    pads = [(0, 0), *((t // 2, t - t // 2) for t in totals), (0, 0)]
    padded = np.pad(x, pads)
    result = np.zeros((len(x), *out, kernel.shape[-1]))
    for row in range(out[0]):
        for column in range(out[1]):
            top, left = row * stride, column * stride
            patch = padded[:, top : top + 3, left : left + 3]
            result[:, row, column] = np.einsum("bijc,ijcd->bd", patch, kernel)
    return result


def forward(variables, images, strides, pixel_max, train):
    """The network in NumPy, float64; returns logits and the batch's statistics."""
    params, stats = variables["params"], variables["batch_stats"]
    x, seen = images / pixel_max - 0.5, {}
    for number, stride in enumerate(strides):
        x = convolve(x, np.float64(params[f"Conv_{number}"]["kernel"]), stride)
        name = f"BatchNorm_{number}"
        seen[name] = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        norm = seen[name] if train else stats[name]
        x = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
        x = np.maximum(x * params[name]["scale"] + params[name]["bias"], 0)
    head = params["Dense_0"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"], seen


@pytest.fixture(scope="module")
def network():
    """A network with every parameter and statistic moved off its initial value."""
    model = ConvNet((3, 4, 5), STRIDES, data=Inputs((7, 8, 1), 10, pixel_max=16))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (6, 7, 8, 1), dtype=np.uint8)
    init = jax.jit(model.init, static_argnames="train")
    variables = jax.tree.map(
        lambda x: np.asarray(x) + rng.uniform(0.1, 0.3, x.shape).astype(x.dtype),
        init(jax.random.key(0), images, train=False),
    )
    return model, variables, images


def evaluation_logits(model, variables, images):
    return jax.jit(model.apply, static_argnames="train")(variables, images, train=False)


def test_evaluation_mode_matches_numpy(network):
    model, variables, images = network
    logits = evaluation_logits(model, variables, images)
    expected, _ = forward(variables, images, STRIDES, 16, train=False)
    assert logits.shape == (6, 10)
    # float32 against float64, logits of order 1 after three layers.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_training_mode_matches_numpy_and_updates_statistics(network):
    model, variables, images = network
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    logits, updated = apply(variables, images, train=True, mutable=("batch_stats",))
    expected, seen = forward(variables, images, STRIDES, 16, train=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for name, moments in seen.items():
        for kind, value in moments.items():
            old = variables["batch_stats"][name][kind]
            np.testing.assert_allclose(
                updated["batch_stats"][name][kind],
                0.9 * old + 0.1 * value,
                rtol=1e-4,
                atol=1e-6,
                err_msg=f"{name} {kind}",
            )


def test_pixel_max_scales_the_input(network):
    model, variables, images = network
    other = model.clone(data=model.data._replace(pixel_max=32))
    np.testing.assert_allclose(
        evaluation_logits(model, variables, images),
        evaluation_logits(other, variables, 2 * images),
        rtol=1e-5,
        atol=1e-6,
    )


def test_parameters(network):
    _, variables, _ = network
    sizes = jax.tree.map(np.size, variables["params"])
    expected = {
        "Conv_0": {"kernel": 9 * 1 * 3},
        "Conv_1": {"kernel": 9 * 3 * 4},
        "Conv_2": {"kernel": 9 * 4 * 5},
        "BatchNorm_0": {"scale": 3, "bias": 3},
        "BatchNorm_1": {"scale": 4, "bias": 4},
        "BatchNorm_2": {"scale": 5, "bias": 5},
        "Dense_0": {"kernel": 50, "bias": 10},
    }
    assert sizes == expected
