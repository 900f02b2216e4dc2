"""modeling/terms.py against a sum over dense maps in NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from benchmarks.growth import synthetic_batch

from helpers import training
from polarmask_tf import config as configs
from polarmask_tf.modeling import step, terms
from polarmask_tf.ops import geometry, overlap
from polarmask_tf.ops.targets import IGNORED
from polarmask_tf.training.train import build


@pytest.mark.parametrize("classification", ["label", "iou"])
def test_class_scores_learn_one_or_the_iou(classification):
    settings = (*training.QUALITY, "targets.match=static", "model.fpn.levels=[3]", f"targets.classification={classification}")
    config = configs.load("shapes", [*training.TINY, *settings])
    model = build(config, 3)
    images, instances = synthetic_batch(config, 5, edges=16)
    instances["classes"] %= 3
    instances = {name: tf.constant(value) for name, value in instances.items()}
    outputs = model(images, training=False)
    prepared = step.prepare(model, images, instances)
    encoded, (maps,) = prepared.targets, outputs.values()
    found = terms.losses_of(model, outputs, encoded, prepared.normalizers)[model.loss_names.index("class")]

    logits, rays = (maps[name].numpy().reshape(len(images), -1, maps[name].shape[3]) for name in ("class_logits", "ray_logits"))
    labels, at = encoded.labels.numpy(), encoded.positives.numpy()
    assert len(at) > 10
    lengths = geometry.rays_from_logits(tf.constant(rays[tuple(at.T)]), model.ray_units["3"])
    iou = overlap.iou(overlap.areas(lengths, encoded.crossings, encoded.border)).numpy()
    assert iou.std() > 0.01  # so that it matters whose it is
    target = np.zeros(logits.shape)
    target[(*at.T, labels[tuple(at.T)])] = 1 if classification == "label" else iou
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    entropy = -target * np.log(p) - (1 - target) * np.log(1 - p)
    weight = 0.25 if classification == "label" else 0.75
    expected = np.where(target > 0, weight, 0.75) * np.abs(target - p) ** 2 * entropy
    expected = expected[labels != IGNORED].sum() / prepared.normalizers[model.loss_names.index("class")]
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_levels_are_in_the_order_of_their_numbers():
    """As text, 10 comes before 3: a model with P10 learned what belongs to other locations."""
    sizes = {10: 1, 3: 4, 9: 2}
    outputs = {str(level): {"ray_logits": tf.fill([2, size, size, 4], float(level))} for level, size in sizes.items()}
    assert terms._flat(outputs, "ray_logits")[1, :, 0].numpy().tolist() == [3] * 16 + [9] * 4 + [10]
    found = terms._locations(outputs).numpy()
    assert found[[0, 1, 16, 20]].tolist() == [[4, 4], [12, 4], [256, 256], [512, 512]]
