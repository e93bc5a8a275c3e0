import numpy as np
import pytest

from experiments.training import losses


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "inputs": rng.integers(0, 256, (4, 3, 3, 2), dtype=np.uint8),
        "labels": np.array([0, 1, 2, 2], np.int32),
        "partner_inputs": rng.integers(0, 256, (4, 3, 3, 2), dtype=np.uint8),
        "partner_labels": np.array([2, 1, 0, 1], np.int32),
        "mix": np.full(4, 0.7, np.float32),
    }


@pytest.fixture
def logits():
    return np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_is_the_cross_entropy_with_dense_targets(batch, logits, smoothing, mixed):
    def smoothed(labels):
        return (1 - smoothing) * np.eye(3)[labels] + smoothing / 3

    targets = smoothed(batch["labels"])
    if mixed:
        targets = 0.7 * targets + 0.3 * smoothed(batch["partner_labels"])
    else:
        batch = {name: batch[name] for name in ("inputs", "labels")}
    expected = -np.mean(np.sum(targets * log_softmax(np.float64(logits)), axis=-1))
    found = losses.mean_loss(logits, batch, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mixup_mixes_inputs(batch):
    found = losses.mixed_inputs(batch)
    expected = 0.7 * np.float64(batch["inputs"]) + 0.3 * batch["partner_inputs"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_mixup_inputs_stay_as_they_are(batch):
    assert losses.mixed_inputs({"inputs": batch["inputs"]}) is batch["inputs"]


def test_loss_of_text_is_the_mean_over_tokens(logits):
    labels = np.array([[0, 1], [2, 2]], np.int32)
    found = losses.mean_loss(logits.reshape(2, 2, 3), {"labels": labels})
    flat = losses.mean_loss(logits, {"labels": labels.ravel()})
    np.testing.assert_allclose(found, flat, rtol=1e-6)
