"""Fusion against scipy and autograd on the same objective, planted solutions, and what it refuses."""

import doctest
import re
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.ensemble import choice, fusion, newton
from asc_ray.ensemble.center import center
from asc_ray.ensemble.fusion import Fusion, fit, fit_shards
from asc_ray.ensemble.newton import Shard
from asc_ray.errors import UserError

RIDGE, PRIOR = st.floats(1e-4, 1.0), st.sampled_from(["empirical", "uniform", "given"])


def problem(seed: int, systems: int = 3, clips: int = 60, classes: int = 4, scale: float = 1.0):
    """Logits of systems of unequal merit, and labels with every class and unequal counts."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.choice(classes, clips - classes, p=_prior(classes))])
    merit = rng.uniform(0, 2, (systems, 1, 1))
    logits = merit * np.eye(classes)[labels] + rng.standard_normal((systems, clips, classes))
    return scale * logits, labels


def _prior(classes: int) -> np.ndarray:
    p = np.arange(1.0, classes + 1)
    return p / p.sum()


def prior_of(kind: str, classes: int):
    return {f"scene {k}": float(p) for k, p in enumerate(_prior(classes)[::-1])} if kind == "given" else kind


def objective(theta: torch.Tensor, logits: np.ndarray, labels: np.ndarray, fused: Fusion, prior: str) -> torch.Tensor:
    """J as the module's docstring has it, in torch, with the ridge, the centre and the noise of `fused`."""
    z_s, y = torch.tensor(logits), torch.tensor(labels)
    w, b = theta[: len(logits)], theta[len(logits) :]
    z = (w[:, None, None] * z_s).sum(0) + b
    losses = torch.nn.functional.cross_entropy(z, y, reduction="none")
    each = torch.stack([losses[y == k].mean() for k in range(z.shape[1])])
    given = torch.tensor(_prior(z.shape[1])[::-1].copy())
    data = {"uniform": each.mean(), "given": each @ given, "empirical": losses.mean()}[prior]
    away = torch.tensor(fused.noise) * (w - torch.tensor(fused.center))
    return data + fused.ridge / 2 * ((away**2).sum() + (b**2).sum())


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    systems=st.integers(1, 5),
    classes=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    ridge=RIDGE,
    prior=PRIOR,
)
def test_the_minimum_is_scipys(seed, systems, classes, scale, ridge, prior):
    logits, labels = problem(seed, systems=systems, classes=classes, scale=scale)
    fused = fit(logits, labels, ridge=ridge, scene_prior=prior_of(prior, classes))

    def value(theta):
        return objective(torch.tensor(theta), logits, labels, fused, prior).item()

    def penalty(theta):
        away = np.concatenate([fused.noise * (theta[:systems] - fused.center), theta[systems:]])
        return ridge / 2 * away @ away

    def gradient(theta):
        theta = torch.tensor(theta, requires_grad=True)
        objective(theta, logits, labels, fused, prior).backward()
        return theta.grad.numpy()

    def hessian(theta):
        return torch.autograd.functional.hessian(
            lambda t: objective(t, logits, labels, fused, prior), torch.tensor(theta)
        ).numpy()

    start = np.concatenate([fused.center, np.zeros(classes)])
    reference = scipy.optimize.minimize(
        value, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-11, "maxiter": 500}
    )
    ours = np.concatenate([fused.weights, fused.biases])
    assert fused.objective_after == pytest.approx(value(ours), rel=1e-12)
    assert fused.objective_after <= reference.fun + 1e-12
    # J curves by at least `ridge` in the units of the noise, so a gradient of 1e-9 is as near as this:
    units, near = np.concatenate([fused.noise, np.ones(classes)]), 1e-9 * np.sqrt(len(ours)) / ridge
    np.testing.assert_allclose(
        units * ours, units * reference.x, atol=near + 1e-7 * max(1.0, np.abs(units * reference.x).max())
    )
    assert np.abs(gradient(ours) / units).max() <= 1e-9
    average = np.concatenate([np.full(systems, 1 / systems), np.zeros(classes)])
    assert fused.objective_before == pytest.approx(value(average) - penalty(average), rel=1e-12)
    assert fused.objective_after <= value(start) + 1e-14
    assert abs(fused.biases.sum()) < 1e-12
    assert fused.iterations <= 20
    each = np.eye(systems, systems + classes)
    alone = fusion.objectives(
        [Shard(partial(np.asarray, logits), labels)],
        systems=fused.systems, labels=fused.labels, scene_prior=fused.scene_prior,
    )  # fmt: skip
    np.testing.assert_allclose([*alone.values()], [value(t) - penalty(t) for t in each], rtol=1e-9)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    systems=st.integers(2, 12),
    ridge=RIDGE,
    own=st.sampled_from([1.0, 0.1, 0.01, 0.003]),
)
def test_weights_that_may_not_be_negative(seed, systems, ridge, own):
    """The optimality conditions: no free weight could lower J, and no weight at 0 could by growing.

    Systems are a common part and `own` of their own: when they are near to equal, most weights end at 0.
    """
    logits, labels = problem(seed, systems=systems)
    logits[0] *= -1  # a system that is wrong more often than right
    logits = 2 * logits[-1] + own * logits
    fused = fit(logits, labels, ridge=ridge, nonnegative=True)
    assert (fused.weights >= 0).all()
    assert fused.iterations <= 20
    theta = torch.tensor(np.concatenate([fused.weights, fused.biases]), requires_grad=True)
    objective(theta, logits, labels, fused, "empirical").backward()
    gradient = theta.grad.numpy()
    free = np.concatenate([fused.weights > 0, np.ones(4, dtype=bool)])
    assert np.abs(gradient[free]).max() < 1e-8
    assert (gradient[~free] > -1e-8).all()
    bounds = [(0, None)] * systems + [(None, None)] * 4

    def both(x):
        t = torch.tensor(x, requires_grad=True)
        j = objective(t, logits, labels, fused, "empirical")
        j.backward()
        return j.item(), t.grad.numpy()

    x0 = np.concatenate([np.full(systems, 1 / systems), np.zeros(4)])
    reference = scipy.optimize.minimize(
        both, x0, jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000}
    )
    assert fused.objective_after <= reference.fun + 1e-9
    unbound = fit(logits, labels, ridge=ridge)
    assert unbound.objective_after <= fused.objective_after + 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 299), unique=True, max_size=6))
def test_any_sharding_gives_the_same_fusion(seed, cuts):
    logits, labels = problem(seed, clips=300)
    groups = np.arange(300) // 7
    whole = fit(logits, labels, places=groups)
    edges = [0, *sorted(cuts), 300]
    shards = [Shard(partial(np.asarray, logits[:, a:b]), labels[a:b]) for a, b in pairwise(edges)]
    parts = fit_shards(shards, systems=whole.systems, labels=whole.labels, places=groups)
    assert parts.ridge == whole.ridge
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(parts.biases, whole.biases, rtol=1e-10, atol=1e-10)
    assert parts.objective_after == pytest.approx(whole.objective_after, rel=1e-10)


def test_many_clips_start_from_a_sample_of_them(monkeypatch):
    """Without a ridge the minimum does not depend on where the search starts, nor on the sample's centre."""
    logits, labels = problem(10, clips=2_000)
    plain = fit(logits, labels, ridge=0.0)
    monkeypatch.setattr(choice, "SAMPLE", 200)
    sampled = fit(logits, labels, ridge=0.0)
    assert sampled.iterations != plain.iterations
    np.testing.assert_allclose(sampled.weights, plain.weights, rtol=1e-8)
    assert sampled.objective_before == plain.objective_before


def test_the_ridge_goes_by_all_places_and_the_choice_by_a_sample_of_them(monkeypatch):
    logits, labels = problem(11, systems=6, clips=3_000)
    places = np.arange(3_000) // 10
    monkeypatch.setattr(choice, "SAMPLE", 600)
    fused = fit(logits, labels, places=places)
    assert fused.ridge == pytest.approx(choice.chosen(fused.choice) * choice.KNOWN_PLACES / 300)
    few, place_of_few = choice.sample([Shard(partial(np.asarray, logits), labels)], places)
    assert len(few.scene) == 600
    assert np.unique(place_of_few).size == 60


def test_planted_weights_and_biases_are_recovered():
    rng = np.random.default_rng(0)
    weights, biases = np.array([0.7, -0.3, 1.2]), np.array([0.5, 0.25, -0.25, -0.5])
    logits = rng.standard_normal((3, 40_000, 4))
    z = np.tensordot(weights, logits, axes=1) + biases
    labels = (z + rng.gumbel(size=z.shape)).argmax(axis=1)  # a draw from softmax(z)
    fused = fit(logits, labels, ridge=0.0)
    np.testing.assert_allclose(fused.weights, weights, atol=0.03)
    np.testing.assert_allclose(fused.biases, biases, atol=0.03)


def test_blocks_change_nothing(monkeypatch):
    logits, labels = problem(1, clips=103)
    whole = fit(logits, labels)
    monkeypatch.setattr(fusion, "BLOCK", 10)
    monkeypatch.setattr(newton, "BLOCK", 10)
    monkeypatch.setattr(fusion, "CLIPS_A_SHARD", 25)
    blocks = fit(logits, labels)
    np.testing.assert_allclose(blocks.weights, whole.weights, rtol=1e-10)
    np.testing.assert_array_equal(blocks.apply(logits), whole.apply(logits))


@pytest.mark.parametrize(("systems", "clips"), [(1, 60), (3, 61), (1, 61)])
def test_the_logits_stay_what_they_are(monkeypatch, systems, clips):
    """A block of one clip, and a single system, are contiguous whichever way they are turned."""
    monkeypatch.setattr(newton, "BLOCK", 10)
    logits, labels = problem(13, systems=systems, clips=clips)
    before = logits.copy()
    fit(logits, labels)
    np.testing.assert_array_equal(logits, before)


def test_a_clips_offset_changes_nothing():
    """Logits are defined up to a constant per system and clip, so log-posteriors fuse as the logits do."""
    logits, labels = problem(2)
    shifted = logits + np.random.default_rng(0).normal(0, 5, (*logits.shape[:2], 1))
    posteriors = np.log(scipy.special.softmax(logits, axis=2))
    for same in (shifted, posteriors):
        np.testing.assert_allclose(fit(same, labels).weights, fit(logits, labels).weights, rtol=1e-9)


def test_a_strong_ridge_gives_the_centre():
    logits, labels = problem(3)
    fused = fit(logits, labels, ridge=1e9)
    np.testing.assert_allclose(fused.weights, fused.center, atol=1e-8)
    np.testing.assert_allclose(fused.biases, 0, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_a_system_twice_shares_its_weight(ridge):
    logits, labels = problem(4, systems=2, clips=200)
    fused = fit(logits[[0, 0, 1]], labels, ridge=ridge)
    assert fused.weights[0] == pytest.approx(fused.weights[1], abs=1e-9)
    if ridge == 0.0:  # the ridge weighs two half weights differently from one whole
        alone = fit(logits, labels, ridge=ridge)
        assert fused.weights[:2].sum() == pytest.approx(alone.weights[0], rel=1e-7)


def test_systems_that_say_nothing_or_the_same_are_named():
    logits, labels = problem(4, systems=2, clips=200)
    constant = np.random.default_rng(0).normal(0, 5, (200, 1)).repeat(4, axis=1)
    stacked = np.stack([logits[0], constant, logits[1], logits[0] + constant])
    fused = fit(stacked, labels, systems=["a", "flat", "b", "a again"], ridge=1e-4)
    assert fused.notes == (
        "flat: its logits do not differ between the scenes; its weight means nothing",
        "a and a again: the same logits; they share one weight evenly",
    )
    assert fused.weights[0] == pytest.approx(fused.weights[3])
    assert fused.weights[1] == pytest.approx(0.0)
    assert fit(logits * np.array([1e6, 0.1])[:, None, None], labels, ridge=1e-4).notes == ()  # quiet is not constant


def test_a_system_of_huge_logits_does_not_hide_the_others():
    logits, labels = problem(12, clips=500)
    scaled = logits * np.array([1e6, 1.0, 1e-3])[:, None, None]
    fused, plain = (fit(z, labels, ridge=0.0) for z in (scaled, logits))
    np.testing.assert_allclose(fused.weights * [1e6, 1.0, 1e-3], plain.weights, rtol=1e-5)
    assert fused.objective_after == pytest.approx(plain.objective_after, rel=1e-9)


def test_a_single_system_gets_a_temperature_and_biases():
    logits, labels = problem(5, systems=1, clips=4_000)
    overconfident = fit(10 * logits, labels, ridge=0.0)
    calm = fit(logits, labels, ridge=0.0)
    assert overconfident.weights[0] == pytest.approx(calm.weights[0] / 10, rel=1e-7)
    assert overconfident.objective_after == pytest.approx(calm.objective_after, rel=1e-9)


def test_apply_is_equation_4():
    logits, labels = problem(6)
    fused = fit(logits, labels)
    by_hand = sum(w * z for w, z in zip(fused.weights, logits, strict=True)) + fused.biases
    out = fused.apply(logits.astype(np.float32))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, by_hand, atol=1e-5)
    with pytest.raises(UserError, match=r"\(2, 60, 4\).*3 systems"):
        fused.apply(logits[:2])


def test_save_and_load_are_exact(tmp_path):
    logits, labels = problem(7)
    fused = fit(logits, labels, systems=["a", "b", "ü"], labels=list("wxyz"), ridge=1e-3)
    fused.save(tmp_path / "fusion.json")
    again = Fusion.load(tmp_path / "fusion.json")
    text = (tmp_path / "fusion.json").read_text()
    (tmp_path / "older.json").write_text(text.replace("scene_prior", "class_prior"))
    assert Fusion.load(tmp_path / "older.json").scene_prior == again.scene_prior
    for name in Fusion.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(fused, name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights": {"a": 1.0}, "biases": {"x": 0.0}}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "fusion.json").write_text(text)
    with pytest.raises(UserError, match=r"fusion\.json"):
        Fusion.load(tmp_path / "fusion.json")


def test_what_is_refused():
    logits, labels = problem(8)
    broken = logits.copy()
    broken[1, 3:5, 0], broken[1, 7, 2] = np.nan, np.inf
    for match, arguments in {
        r"b: 3 of 60 clips": (broken, labels),
        r"\(3, 60\)": (logits[:, :, 0], labels),
        r"\(59,\)": (logits, labels[1:]),
        r"indices 0 to 3": (logits, labels + 1),
        r"scenes of type float64": (logits, labels.astype(float)),
        r"no clip.*scene 3 0": (logits[:, labels != 3], labels[labels != 3]),
    }.items():
        with pytest.raises(UserError, match=match):
            fit(*arguments, systems=["a", "b", "c"])
    with pytest.raises(UserError, match=re.escape("system names a, a, b; expected 3 different")):
        fit(logits, labels, systems=["a", "a", "b"])
    with pytest.raises(UserError, match="2 names of systems and 4 of labels for logits of 3 systems"):
        fit(logits, labels, systems=["a", "b"])
    shares = {f"scene {k}": 0.25 for k in range(4)}
    for prior in ("unifrom", {"class 0": 1.0}, shares | {"class 0": 0.5}, shares | {"class 0": 0.5, "class 1": 0.0}):
        with pytest.raises(UserError, match=r"fusion.scene_prior: found .* give each of scene 0, scene 1"):
            fit(logits, labels, scene_prior=prior)
    for ridge in ("none", -1.0, np.nan):
        with pytest.raises(UserError, match=r"fusion\.ridge: found .* expected auto, or a number from 0"):
            fit(logits, labels, ridge=ridge)
    with pytest.raises(UserError, match=r"one scene alone \(scene 0\)"):
        fit(logits[:, :, :1], np.zeros(60, int))
    with pytest.raises(UserError, match="3 places for 60 clips"):
        fit(logits, labels, places=[0, 1, 2])


def test_separable_classes_need_a_ridge():
    """One perfect system: J falls for ever as w grows, so only the ridge makes a minimum."""
    labels = np.arange(30) % 3
    logits = np.eye(3)[labels][None]
    assert fit(logits, labels).weights[0] > 5
    grown = logits * 1e-3
    with np.errstate(all="raise"):
        fused = fit(grown, labels, ridge=1e-2)
    assert np.isfinite(fused.weights).all()


def test_a_ridge_too_weak_for_the_logits_is_not_chosen_and_no_error():
    """A thousand times too large logits of a few clips: not every ridge of the choice leads to a minimum."""
    rng = np.random.default_rng(1)
    labels = np.arange(44) % 3
    logits = 1000 * (rng.uniform(0, 2, (8, 1, 1)) * np.eye(3)[labels] + rng.standard_normal((8, 44, 3)))
    fused = fit(logits, labels)
    assert fused.objective_after < fused.objective_before
    assert np.isfinite(fused.weights).all()


def test_docstring_example():
    assert doctest.testmod(fusion).failed == 0


def test_the_chosen_ridge_holds_out_whole_groups_and_calms_a_small_sample():
    """Twelve noisy systems and 60 clips of 12 places: without a ridge the fusion learns the noise by heart."""
    rng = np.random.default_rng(5)

    def sample(n):
        labels = np.arange(n) % 4
        return 0.5 * np.eye(4)[labels] + rng.standard_normal((12, n, 4)), labels

    logits, labels = sample(60)
    fresh, answers = sample(4000)

    def log_loss(fused):
        z = fused.apply(fresh).astype(float)
        return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), answers]))

    chosen = fit(logits, labels, places=np.arange(60) // 5)
    bare = fit(logits, labels, ridge=1e-4)
    assert chosen.ridge > 1e-3
    assert log_loss(chosen) < log_loss(bare)
    # Every group twice, as two clips of one second: only whole groups left out see through it.
    twice = np.concatenate([logits, logits], axis=1), np.concatenate([labels, labels])
    assert fit(*twice, places=np.tile(np.arange(60), 2)).ridge > fit(*twice).ridge


@pytest.mark.parametrize("clips", [60, 600, 30_000])
def test_labels_of_other_clips_are_said_to_be_no_better_than_chance(clips):
    logits, labels = problem(3, systems=5, clips=clips)
    assert fit(logits, labels).notes == ()
    shuffled = np.random.default_rng(1).permutation(labels)
    with pytest.warns(
        UserWarning, match=r"no system agrees with the scenes on more clips than chance has it \(\d+ % at"
    ):
        notes = fit(logits, shuffled).notes
    assert "their columns are in that of the labels" in notes[0]


def test_a_single_system_that_knows_something_is_enough():
    logits, labels = problem(4, systems=5, clips=600)
    noise = np.random.default_rng(2).standard_normal(logits.shape)
    noise[3] = logits[3]
    assert fit(noise, labels).notes == ()


def test_uneven_classes_are_no_knowledge():
    """Nine of ten clips are of one class, and all systems always answer it."""
    labels = (np.arange(600) % 10 == 0).astype(int)
    logits = 0.1 * np.random.default_rng(0).standard_normal((3, 600, 2)) + np.array([3.0, 0.0])
    with pytest.warns(UserWarning, match=r"than chance has it \(90 % at most\)"):
        fit(logits, labels)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), scales=st.lists(st.sampled_from([1e-4, 0.1, 3.0, 1e5]), min_size=3, max_size=3))
def test_another_scale_or_order_of_the_systems_gives_the_same_answers(seed, scales):
    logits, labels = problem(seed, clips=90)
    places = np.arange(90) // 5
    plain = fit(logits, labels, places=places)
    order = np.random.default_rng(seed).permutation(3)
    changed = logits[order] * np.array(scales)[:, None, None]
    other = fit(changed, labels, places=places)
    assert other.ridge == plain.ridge
    np.testing.assert_allclose(other.apply(changed), plain.apply(logits), rtol=1e-4, atol=1e-4)


def independent(merit, noise, clips=40_000, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % classes
    drawn = rng.standard_normal((len(merit), clips, classes)) * np.array(noise)[:, None, None]
    return drawn + np.array(merit)[:, None, None] * np.eye(classes)[labels], labels


def centre(logits, labels) -> newton.Pull:
    classes = logits.shape[2]
    return center([Shard(partial(np.asarray, logits), labels)], np.full(classes, 1 / len(labels)))


def test_the_centre_of_independent_systems_of_normal_noise_is_bayes():
    """The log-posterior of independent systems is the sum of mu_s / sigma_s^2 times their logits."""
    merit, noise = np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.5, 0.25])
    pull = centre(*independent(merit, noise))
    np.testing.assert_allclose(pull.unit, noise, rtol=0.02)
    np.testing.assert_allclose(pull.center, merit / noise**2, rtol=0.04)


def test_in_the_centre_a_weak_system_counts_for_less_than_its_share_and_a_very_weak_one_for_nothing():
    pull = centre(*independent([2.0, 2.0, 1.5, 0.2], [1.0, 1.0, 1.0, 1.0]))
    half_of_the_mean = 0.5 * np.mean([2.0, 2.0, 1.5, 0.2])
    assert pull.center[2] / pull.center[0] == pytest.approx(
        (1.5 - half_of_the_mean) / (2.0 - half_of_the_mean), rel=0.03
    )
    assert pull.center[3] == 0


def test_in_the_centre_copies_share_a_weight_and_what_is_wrong_has_none():
    logits, labels = independent([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    copies = np.stack([logits[0], logits[0], logits[1], 4 * logits[2][:, [1, 2, 3, 4, 0]]])
    pull = centre(copies, labels)
    assert pull.center[0] == pytest.approx(pull.center[1])
    assert pull.center[0] + pull.center[1] == pytest.approx(pull.center[2], rel=0.02)
    assert pull.center[3] == 0


def test_a_half_that_knows_little_does_not_spoil_the_fusion_of_few_places():
    """The ridge must not pull to the average: so it was, and the fusion was eight points worse than half of it."""
    rng = np.random.default_rng(0)

    def sample(places, each):
        place = np.arange(places * each) // each
        labels = place % 6
        of_place = rng.standard_normal((2, places, 6))[:, place]
        own = rng.standard_normal((12, len(place), 6))
        merit = np.array([3.0] * 6 + [0.3] * 6)[:, None, None]
        return merit * np.eye(6)[labels] + of_place[np.arange(12) // 6] + own, labels, place

    def log_loss(z, labels):
        return float(-scipy.special.log_softmax(z, axis=1)[np.arange(len(labels)), labels].mean())

    logits, labels, place = sample(18, 7)
    fresh, answers, _ = sample(600, 2)
    with pytest.warns(UserWarning, match="eq. 4 is learned on 18 places"):
        fused = fit(logits, labels, places=place)
    ours = log_loss(fused.apply(fresh), answers)
    assert ours < log_loss(fresh.mean(axis=0), answers) - 0.1
    assert ours < log_loss(fresh[:6].mean(axis=0), answers) + 0.02
    assert fused.weights[:6].sum() > 5 * abs(fused.weights[6:].sum())


def test_another_ridge_than_that_of_the_places_is_taken_when_it_is_better_by_a_standard_error():
    by_places = choice.Candidate(1.0, 0.50, 0.0)
    weaker, stronger = choice.Candidate(0.1, 0.47, 0.02), choice.Candidate(10.0, 0.49, 0.02)
    assert choice.chosen((stronger, by_places)) == 1.0
    assert choice.chosen((stronger, by_places, weaker)) == 0.1
    assert choice.chosen((by_places, choice.Candidate(0.01, np.inf, np.inf))) == 1.0
    assert choice.chosen(()) == 1.0


def test_the_standard_error_is_that_of_the_mean_over_places():
    """Places of equal size: the deviation of the places' mean differences, over the root of their number."""
    rng = np.random.default_rng(0)
    place, losses = np.arange(60) % 12, rng.random((len(choice.MULTIPLES), 60))
    found = choice._compared(losses, np.full(60, 1 / 60), place)
    for one, own in zip(found, losses, strict=True):
        apart = own - losses[choice.MULTIPLES.index(1.0)]
        means = [apart[place == name].mean() for name in range(12)]
        assert one.standard_error == pytest.approx(np.std(means, ddof=1) / np.sqrt(12), abs=1e-12)
        assert one.log_loss == pytest.approx(own.mean())


def test_the_edge_of_the_choice_is_said():
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 4
    alike = 2 * np.eye(4)[labels] + rng.standard_normal((200, 4))
    strongest = fit(np.stack([alike] * 6), labels, places=labels * 10 + np.arange(200) // 40)
    edge = choice.chosen(strongest.choice) == choice.MULTIPLES[0]
    assert edge
    assert edge == any("nothing beside the centre" in note for note in strongest.notes)
    plain = fit(*problem(4, systems=2, clips=200), places=np.arange(200) // 4)
    assert choice.chosen(plain.choice) not in (choice.MULTIPLES[0], choice.MULTIPLES[-1])
    assert plain.notes == ()
