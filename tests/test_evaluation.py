"""Evaluation against closed forms on answers made by hand."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asc_ray.errors import UserError
from asc_ray.evaluation import scores as evaluation
from asc_ray.evaluation.gains import gain
from asc_ray.evaluation.groups import device_groups
from asc_ray.evaluation.scores import Evaluation, evaluate, guessed, log_posteriors

LABELS = ["airport", "bus", "park"]


def answers(columns, confidence: float) -> np.ndarray:
    """Logits (N, 3) whose softmax is `confidence` at `columns` and equal elsewhere."""
    p = np.full((len(columns), 3), (1 - confidence) / 2)
    p[np.arange(len(columns)), columns] = confidence
    return np.log(p) + 7.0  # logits are defined up to a constant


def test_closed_forms():
    scene = [0, 0, 0, 0, 1, 1, 2]
    answer = [0, 0, 0, 1, 1, 2, 2]
    device = ["a", "s1", "s4", "s4", "a", "s1", "b"]
    e = evaluate(answers(answer, 0.8), scene, device, LABELS, unseen=["s4"])
    assert e.clips == 7
    assert e.accuracy == pytest.approx(5 / 7)
    assert e.macro_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert e.log_loss == pytest.approx(-(5 * np.log(0.8) + 2 * np.log(0.1)) / 7)
    assert e.calibration_error == pytest.approx(0.8 - 5 / 7)
    assert {name: (d.clips, d.accuracy) for name, d in e.per_device.items()} == {
        "a": (2, 1.0), "b": (1, 1.0), "s1": (2, 0.5), "s4": (2, 0.5),
    }  # fmt: skip
    assert e.groups == pytest.approx({"seen": 4 / 5, "unseen": 1 / 2, "real": 1.0})
    assert e.per_scene == {"airport": 0.75, "bus": 0.5, "park": 1.0}
    older = e.model_dump_json().replace("per_scene", "per_class")  # as earlier versions wrote it
    assert Evaluation.model_validate_json(older) == e
    assert e.confusion == ((3, 1, 0), (0, 1, 1), (0, 0, 1))


def test_calibration_error_is_weighted_over_bins():
    logits = np.concatenate([answers([0] * 6, 0.9), answers([0] * 4, 0.5)])
    scene = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]  # half right at 0.9, all right at 0.5
    e = evaluate(logits, scene, ["a"] * 10, LABELS, unseen=[])
    assert e.calibration_error == pytest.approx(0.6 * (0.9 - 0.5) + 0.4 * (1.0 - 0.5))


def test_certain_answers_and_large_logits():
    """Softmax of 1 falls into the last bin, and exp never overflows."""
    logits = 1e4 * np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    e = evaluate(logits, [0, 1, 2, 1], ["a"] * 4, LABELS, unseen=[])
    assert e.log_loss == pytest.approx(1e4 / 4)
    assert e.calibration_error == pytest.approx(1 / 4)


@given(seed=st.integers(0, 2**32 - 1), clips=st.integers(1, 60))
def test_parts_add_up(seed, clips):
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 3, clips)
    device = rng.choice(["a", "b", "s1", "s9"], clips)
    e = evaluate(rng.standard_normal((clips, 3)), scene, device, LABELS, unseen=["s9"])
    confusion = np.array(e.confusion)
    assert confusion.sum() == clips == sum(d.clips for d in e.per_device.values())
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(scene, minlength=3))
    assert np.trace(confusion) == round(e.accuracy * clips)
    assert sum(d.clips * d.accuracy for d in e.per_device.values()) == pytest.approx(e.accuracy * clips)
    unseen = (device == "s9").mean()
    assert unseen * e.groups.get("unseen", 0.0) + (1 - unseen) * e.groups.get("seen", 0.0) == pytest.approx(e.accuracy)
    assert list(e.per_scene) == [label for k, label in enumerate(LABELS) if k in scene]
    assert 0.0 <= e.calibration_error <= 1.0
    assert Evaluation.model_validate_json(e.model_dump_json()) == e


def test_reliability_has_a_bin_for_each_confidence():
    e = evaluate(np.concatenate([answers([0] * 6, 0.9), answers([0] * 4, 0.5)]), [0] * 3 + [1] * 3 + [0] * 4,
                 ["a"] * 6 + ["b"] * 4, LABELS, unseen=[])  # fmt: skip
    found = [(b.clips, b.confidence, b.accuracy) for b in e.reliability]
    assert found == [(4, pytest.approx(0.5), 1.0), (6, pytest.approx(0.9), 0.5)]
    assert e.per_device["a"].calibration_error == pytest.approx(0.4)
    assert e.per_device["b"].log_loss == pytest.approx(-np.log(0.5))


def test_the_gain_is_resampled_by_places():
    """Ten clips of a place that gain alike are one observation: repeating each clip does not narrow the interval."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 3, 40)
    before = rng.standard_normal((40, 3))
    after = before + 0.5 * np.eye(3)[scene] + 0.5 * rng.standard_normal((40, 3))
    clips = gain(before, after, scene, np.arange(40))
    repeated = gain(*(np.repeat(x, 10, axis=0) for x in (before, after, scene, np.arange(40))))
    assert repeated.accuracy.model_dump() == pytest.approx(clips.accuracy.model_dump())
    assert repeated.log_loss.model_dump() == pytest.approx(clips.log_loss.model_dump())
    losses = [-log_posteriors(z)[np.arange(40), scene] for z in (before, after)]
    difference = losses[0] - losses[1]
    assert clips.log_loss.value == pytest.approx(difference.mean())
    width = 2 * 1.96 * difference.std() / np.sqrt(40)  # of the normal distribution
    assert clips.log_loss.high - clips.log_loss.low == pytest.approx(width, rel=0.1)
    assert clips.log_loss.low < clips.log_loss.value < clips.log_loss.high
    as_one = gain(*(np.repeat(x, 10, axis=0) for x in (before, after, scene)), np.arange(400))
    assert as_one.log_loss.high - as_one.log_loss.low < 0.5 * width
    nothing = gain(before, before, scene, np.arange(40))
    assert nothing.log_loss.low == nothing.log_loss.high == nothing.accuracy.value == 0


def test_the_gain_is_resampled_by_seeds_too():
    """Clips that all gain alike, by an amount that only the seed decides, leave the spread of the seeds' mean."""
    rng = np.random.default_rng(0)
    scene, places = rng.integers(0, 3, 60), np.arange(60)
    before = np.zeros((9, 60, 3))
    amounts = rng.normal(0.5, 0.3, 9)
    after = before + amounts[:, None, None] * np.eye(3)[scene]
    found = gain(before, after, scene, places)
    each = np.array([gain(b, a, scene, places).log_loss.value for b, a in zip(before, after, strict=True)])
    assert found.runs == 9
    assert found.log_loss.value == pytest.approx(each.mean())
    width = 2 * 1.96 * each.std(ddof=1) / 3
    assert found.log_loss.high - found.log_loss.low == pytest.approx(width, rel=0.1)
    assert found.log_loss.told
    both = gain(before + amounts[:, None, None] * np.eye(3)[scene], after, scene, places)
    assert both.log_loss.low == both.log_loss.high == 0  # a training and its partner are drawn together
    # Of four, three are drawn: in one of 64 draws the least thrice, in three of 64 twice with the next one.
    of_four = gain(before[:4], after[:4], scene, places).log_loss
    least, next_, *_, last = np.sort(each[:4])
    assert of_four.low == pytest.approx((2 * least + next_) / 3)
    assert of_four.high == pytest.approx((2 * last + np.sort(each[:4])[2]) / 3)
    alone = gain(before[:1], after, scene, places)
    assert alone.runs == 1
    assert alone.log_loss.model_dump() == pytest.approx(found.log_loss.model_dump(), abs=0.02)


def test_device_groups():
    assert device_groups(["a", "b", "s1"], ["s4", "s1", "b", "a", "phone", "sx"]) == {
        "seen": ("a", "b", "s1"),
        "unseen": ("phone", "s4", "sx"),
        "real": ("a", "b", "phone", "sx"),
    }


def test_real_devices_can_be_given():
    e = evaluate(answers([0, 1], 0.8), [0, 0], ["a", "s1"], LABELS, unseen=[], real=["s1"])
    assert e.groups == {"seen": 0.5, "real": 0.0}


def test_what_is_refused():
    logits, scene, device = answers([0, 1], 0.8), [0, 1], ["a", "a"]
    broken = logits.copy()
    broken[1, 0] = np.inf
    for match, arguments in {
        "1 of 2 clips are not finite": (broken, scene, device),
        r"\(2, 3\), 1 scenes": (logits, [0], device),
        "1 devices": (logits, scene, ["a"]),
        r"\(0, 3\)": (logits[:0], [], []),
        "indices 0 to 2": (logits, [0, 3], device),
    }.items():
        with pytest.raises(UserError, match=match):
            evaluate(*arguments, LABELS, unseen=[])


def test_docstring_example():
    assert doctest.testmod(evaluation).failed == 0


def test_guessing_seldom_reaches_what_is_said():
    right = np.random.default_rng(0).binomial(90, 1 / 10, 10_000) / 90
    assert 0.005 < np.mean(right > guessed(10, 90)) < 0.05
    assert guessed(2, 10**9) == pytest.approx(0.5, abs=1e-3)
