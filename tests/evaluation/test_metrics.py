"""What `eval` measures, held against scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvit import create_model
from tinyvit.evaluation.metrics import EvaluationError, Scores, combined, confusion_counts, labels_for, measure, ranks


def drawn(images, classes, seed):
    rng = np.random.default_rng(seed)
    logits, labels = 2 * rng.standard_normal((images, classes)), rng.integers(0, classes, images)
    return logits, labels, Scores(tuple(f"class {k}" for k in range(classes)), labels, measure(logits, labels))


@given(images=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 2**32 - 1))
def test_scores_are_scikit_learn_s(images, classes, seed):
    from sklearn import metrics  # which takes two seconds: only the process that runs this needs it

    logits, labels, scores = drawn(images, classes, seed)
    numbers, predicted = np.arange(classes), logits.argmax(axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert scores.images == images and np.array_equal(scores.predicted, predicted)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert scores.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=numbers))
    best_five = np.argsort(-logits, axis=1)[:, :5]
    assert scores.top5 == pytest.approx((best_five == labels[:, None]).any(axis=1).mean())
    assert (f"top-5 {scores.top5:.2%}" in scores.summary) == (classes > 5)
    names, recall, counts = zip(*scores.per_class, strict=True)
    assert names == scores.class_names and list(counts) == np.bincount(labels, minlength=classes).tolist()
    expected = metrics.recall_score(labels, predicted, labels=numbers, average=None, zero_division=np.nan)
    np.testing.assert_allclose([np.nan if a is None else a for a in recall], expected)
    expected = metrics.confusion_matrix(labels, predicted, labels=numbers)
    assert np.array_equal(confusion_counts(labels, predicted, classes), expected)
    assert np.array_equal(confusion_counts(labels[:0], predicted[:0], classes), np.zeros((classes, classes)))


def test_among_equal_logits_the_lower_class_comes_first():
    logits = np.array([[1.0, 3.0, 3.0, 0.0]] * 4)
    assert ranks(logits, np.arange(4)).tolist() == [2, 0, 1, 3]


def test_parts_together_have_the_scores_of_the_whole():
    _, labels, whole = drawn(50, 7, 0)
    parts = [slice(0, 1), slice(1, 30), slice(30, 50)]
    together = combined([Scores(whole.class_names, labels[part], whole.measured[:, part]) for part in parts])
    assert together.as_dict() == whole.as_dict() and np.array_equal(together.predicted, whole.predicted)


def test_classes_are_matched_by_name_and_an_unknown_one_is_told_with_its_cures():
    model = create_model("vit_nano_patch8_32", num_classes=3)
    checkpoint = SimpleNamespace(class_names=("cat", "dog", "owl"), config=model.config, path="a.safetensors")
    assert labels_for(checkpoint, np.array([0, 1, 1]), ["owl", "cat"]).tolist() == [2, 0, 0]
    with pytest.raises(EvaluationError, match=r"class 'ball' is not one of the model's: cat, dog, owl; --probe knn "):
        labels_for(checkpoint, np.array([0]), ["ball"])
