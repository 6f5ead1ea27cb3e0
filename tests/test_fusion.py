"""Fusion against scipy and autograd on the same objective, planted solutions, and what it refuses."""

import doctest
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray import fusion
from asc_ray.errors import UserError
from asc_ray.fusion import Fusion, FusionConfig, fit, newton

CONFIGS = st.builds(
    FusionConfig, ridge=st.floats(1e-4, 1.0), class_prior=st.sampled_from(["empirical", "uniform"])
)  # fmt: skip


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


def objective(theta: torch.Tensor, logits: np.ndarray, labels: np.ndarray, config: FusionConfig) -> torch.Tensor:
    """J as the module's docstring has it, in torch."""
    z_s, y = torch.tensor(logits), torch.tensor(labels)
    w, b = theta[: len(logits)], theta[len(logits) :]
    z = (w[:, None, None] * z_s).sum(0) + b
    losses = torch.nn.functional.cross_entropy(z, y, reduction="none")
    if config.class_prior == "uniform":
        data = torch.stack([losses[y == k].mean() for k in range(z.shape[1])]).mean()
    else:
        data = losses.mean()
    return data + config.ridge / 2 * (((w - 1 / len(logits)) ** 2).sum() + (b**2).sum())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    systems=st.integers(1, 5),
    classes=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    config=CONFIGS,
)
def test_the_minimum_is_scipys(seed, systems, classes, scale, config):
    logits, labels = problem(seed, systems=systems, classes=classes, scale=scale)
    fused = fit(logits, labels, ridge=config.ridge, class_prior=config.class_prior)

    def value(theta):
        return objective(torch.tensor(theta), logits, labels, config).item()

    def gradient(theta):
        theta = torch.tensor(theta, requires_grad=True)
        objective(theta, logits, labels, config).backward()
        return theta.grad.numpy()

    def hessian(theta):
        return torch.autograd.functional.hessian(
            lambda t: objective(t, logits, labels, config), torch.tensor(theta)
        ).numpy()

    start = np.concatenate([np.full(systems, 1 / systems), np.zeros(classes)])
    reference = scipy.optimize.minimize(
        value, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-11, "maxiter": 500}
    )
    ours = np.concatenate([fused.weights, fused.biases])
    assert fused.objective_after == pytest.approx(value(ours), rel=1e-12)
    assert fused.objective_after <= reference.fun + 1e-12
    np.testing.assert_allclose(ours, reference.x, atol=1e-7 * max(1.0, np.abs(reference.x).max()))
    assert np.abs(gradient(ours)).max() <= 1e-9 * max(1.0, np.abs(gradient(start)).max())
    assert fused.objective_before == pytest.approx(value(start), rel=1e-12)
    assert fused.objective_after <= fused.objective_before + 1e-14
    assert abs(fused.biases.sum()) < 1e-12


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


def test_a_clips_offset_changes_nothing():
    """Logits are defined up to a constant per system and clip."""
    logits, labels = problem(2)
    shifted = logits + np.random.default_rng(0).normal(0, 5, (*logits.shape[:2], 1))
    np.testing.assert_allclose(fit(shifted, labels).weights, fit(logits, labels).weights, rtol=1e-9)


def test_a_strong_ridge_gives_the_average():
    logits, labels = problem(3)
    fused = fit(logits, labels, ridge=1e9)
    np.testing.assert_allclose(fused.apply(logits), logits.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_a_system_twice_shares_its_weight(ridge):
    logits, labels = problem(4, systems=2, clips=200)
    fused = fit(logits[[0, 0, 1]], labels, ridge=ridge)
    assert fused.weights[0] == pytest.approx(fused.weights[1], abs=1e-9)
    if ridge == 0.0:  # the ridge weighs two half weights differently from one whole
        alone = fit(logits, labels, ridge=ridge)
        assert fused.weights[:2].sum() == pytest.approx(alone.weights[0], rel=1e-7)


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
    fused = fit(logits, labels, systems=["a", "b", "ü"], classes=list("wxyz"), ridge=1e-3)
    fused.save(tmp_path / "fusion.json")
    again = Fusion.load(tmp_path / "fusion.json")
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
        r"class indices 0 to 3": (logits, labels + 1),
        r"labels of type float64": (logits, labels.astype(float)),
        r"no clip.*class 3 0": (logits[:, labels != 3], labels[labels != 3]),
    }.items():
        with pytest.raises(UserError, match=match):
            fit(*arguments, systems=["a", "b", "c"])
    with pytest.raises(UserError, match=re.escape("system names a, a, b; expected 3 different")):
        fit(logits, labels, systems=["a", "a", "b"])


def test_separable_classes_need_a_ridge():
    """One perfect system: J falls for ever as w grows, so only the ridge makes a minimum."""
    labels = np.arange(30) % 3
    logits = np.eye(3)[labels][None]
    assert fit(logits, labels).weights[0] > 5
    grown = logits * 1e-3
    with np.errstate(all="raise"):
        fused = fit(grown, labels, ridge=1e-2)
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

    chosen = fit(logits, labels, groups=np.arange(60) // 5)
    bare = fit(logits, labels, ridge=1e-4)
    assert chosen.ridge > 1e-3
    assert log_loss(chosen) < log_loss(bare)
    # Every group twice, as two clips of one second: only whole groups left out see through it.
    twice = np.concatenate([logits, logits], axis=1), np.concatenate([labels, labels])
    assert fit(*twice, groups=np.tile(np.arange(60), 2)).ridge > fit(*twice).ridge
