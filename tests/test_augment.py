"""Augmentation: who is changed, how, and that it follows from the draw alone."""

from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from asc_ray.audio.augment import Augment, Draw
from asc_ray.audio.config import MASKED, AugmentConfig, DirConfig, FreqMixStyleConfig, FrontendConfig
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.errors import ConfigError

FRONT_END = FrontendConfig()
BANK = ImpulseBank.load(None)
EVERYTHING = AugmentConfig(
    roll=4000,
    dir=DirConfig(p=0.5, apply_to="all"),
    freq_mixstyle=FreqMixStyleConfig(p=0.5, alpha=0.4),
    freq_mask=48,
    time_mask=20,
    mixup_alpha=0.3,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def augment(config: AugmentConfig, mean_energy: float = 1.0, bank: ImpulseBank = BANK) -> Augment:
    return Augment(config, FRONT_END, bank, mean_energy)


def draw(augment: Augment, clips: int, seed: int = 0, energies: torch.Tensor | None = None) -> Draw:
    return augment.draw(torch.ones(clips) if energies is None else energies, ["a"] * clips, seeded(seed))


def convolved(draw: Draw) -> list[int]:
    """The clips that DIR convolves."""
    return (draw.response >= 0).nonzero()[:, 0].tolist()


def same(first: Draw, second: Draw, names: set[str] | None = None) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(Draw) if not names or f.name in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_the_same_generator_gives_the_same_draw_and_the_same_batch():
    ours = augment(EVERYTHING)
    first, second, other = draw(ours, 32), draw(ours, 32), draw(ours, 32, seed=1)
    assert same(first, second)
    assert not same(first, other, {"shift"})
    wave, mel = noise(32, 2000), noise(32, 1, 256, 20)
    wave_before, mel_before = wave.clone(), mel.clone()
    assert torch.equal(ours.wave(wave, first), augment(EVERYTHING).wave(wave, second))
    assert torch.equal(ours.mel(mel, first), augment(EVERYTHING).mel(mel, second))
    assert torch.equal(wave, wave_before), "the input is left as it is"
    assert torch.equal(mel, mel_before)


def test_a_draw_advances_the_generator_by_one_number_whatever_the_settings():
    generators = seeded(), seeded()
    augment(EVERYTHING).draw(torch.ones(8), ["a"] * 8, generators[0])
    augment(AugmentConfig()).draw(torch.ones(3), ["b"] * 3, generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_switching_one_augmentation_off_leaves_the_others_draws():
    without = EVERYTHING.model_copy(update={"roll": 0, "dir": DirConfig()})
    kept = {"fmax_shift", "lam", "partner", "freq_mask", "time_mask", "style_weight", "style_partner"}
    assert same(draw(augment(EVERYTHING), 32), draw(augment(without), 32), kept)


def test_nothing_configured_changes_no_bit():
    ours = augment(AugmentConfig())
    nothing = draw(ours, 8)
    wave, mel = noise(8, 1000), noise(8, 1, 256, 64)
    assert torch.equal(ours.wave(wave, nothing), wave)
    assert torch.equal(ours.mel(mel, nothing), mel)
    assert nothing.lam is None
    assert nothing.partner is None


def test_the_upper_mel_edge_moves_in_steps_over_the_whole_range():
    ours = augment(AugmentConfig())
    shifts = {float(draw(ours, 1, seed).fmax_shift) for seed in range(300)}
    assert shifts == {50.0 * step for step in range(-10, 11)}
    still = Augment(AugmentConfig(), FrontendConfig(fmax_jitter=0.0), BANK, 1.0)
    assert {float(draw(still, 1, seed).fmax_shift) for seed in range(20)} == {0.0}


def test_roll_rotates_each_clip_by_its_own_shift():
    ours = augment(AugmentConfig(roll=700))
    rolled = draw(ours, 64)
    wave = noise(64, 500)
    expected = torch.stack([torch.roll(clip, shift) for clip, shift in zip(wave, rolled.shift.tolist(), strict=True)])
    assert torch.equal(ours.wave(wave, rolled), expected)
    assert -700 <= rolled.shift.min() < -500, "both ways, also further than the clip is long"
    assert 500 < rolled.shift.max() <= 700
    assert len(rolled.shift.unique()) > 50


# -- DIR and ADIR --


@pytest.mark.parametrize("longest", [1, 900, 3000, 9000])
def test_dir_agrees_with_scipy_and_changes_only_the_drawn_clips(longest):
    """Responses shorter than the clip, as long, and three times as long."""
    responses = noise(5, longest, seed=2) * torch.linspace(1, 0.01, longest)
    bank = ImpulseBank(tuple("abcde"), responses)
    ours = augment(AugmentConfig(dir=DirConfig(p=0.5)), bank=bank)
    chosen = draw(ours, 24)
    assert 0 < len(convolved(chosen)) < 24
    wave = noise(24, 3000)
    actual = ours.wave(wave, chosen)
    for clip, used in enumerate(chosen.response.tolist()):
        if used < 0:
            assert torch.equal(actual[clip], wave[clip])
            continue
        expected = scipy.signal.convolve(wave[clip].double().numpy(), responses[used].double().numpy())[:3000]
        assert np.abs(actual[clip].numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_dir_is_drawn_with_its_probability_and_uses_every_response():
    chosen = draw(augment(AugmentConfig(dir=DirConfig(p=0.3))), 10_000)
    assert abs(len(convolved(chosen)) / 10_000 - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5
    assert set(chosen.response.tolist()) == set(range(-1, len(BANK.names)))


@pytest.mark.parametrize(
    ("apply_to", "expected"), [(("a",), [0, 3]), (("b", "s1"), [1, 2]), ("all", [0, 1, 2, 3]), (("c",), [])]
)
def test_dir_applies_to_the_chosen_devices(apply_to, expected):
    ours = augment(AugmentConfig(dir=DirConfig(p=1.0, apply_to=apply_to)))
    chosen = ours.draw(torch.ones(4), ["a", "b", "s1", "a"], seeded())
    assert convolved(chosen) == expected


@pytest.mark.parametrize("threshold", [323.0, "auto"])
def test_adir_convolves_only_clips_above_the_threshold(threshold):
    """Eq. 3: E(x) > T; at the threshold the clip stays."""
    t = torch.tensor(323.0)
    energies = torch.stack([t - 1, t.nextafter(torch.tensor(0.0)), t, t.nextafter(torch.tensor(1e9)), t + 1])
    ours = augment(AugmentConfig(dir=DirConfig(p=1.0, threshold=threshold)), mean_energy=323.0)
    assert convolved(draw(ours, 5, energies=energies)) == [3, 4]
    wave = noise(5, 400)
    changed = (ours.wave(wave, draw(ours, 5, energies=energies)) != wave).any(1)
    assert changed.tolist() == [False, False, False, True, True]


def test_without_a_threshold_energy_does_not_matter_and_with_one_probability_still_does():
    plain = augment(AugmentConfig(dir=DirConfig(p=0.5)))
    adaptive = augment(AugmentConfig(dir=DirConfig(p=0.5, threshold="auto")), mean_energy=10.0)
    silent, loud = torch.zeros(100), torch.full((100,), 11.0)
    assert same(draw(plain, 100, energies=silent), draw(plain, 100, energies=loud))
    assert same(draw(plain, 100, energies=loud), draw(adaptive, 100, energies=loud))
    assert not convolved(draw(adaptive, 100, energies=silent))


# -- masks --


@pytest.mark.parametrize(("field", "axis", "size"), [("freq_mask", 2, 256), ("time_mask", 3, 64)])
def test_a_mask_is_one_band_of_the_masked_value_in_each_clip(field, axis, size):
    ours = augment(AugmentConfig(**{field: 20}))
    mel = noise(1000, 1, 256, 64)
    actual = ours.mel(mel, draw(ours, 1000))
    other = 5 - axis
    masked = (actual == MASKED).all(dim=other)[:, 0]  # (B, size)
    widths = masked.sum(1)
    assert set(widths.tolist()) == set(range(21))
    assert ((masked[:, 1:] & ~masked[:, :-1]).sum(1) + masked[:, 0] <= 1).all(), "in one piece"
    assert masked.any(0).all(), "anywhere, edges included"
    kept = ~masked.unsqueeze(1).unsqueeze(other)
    assert torch.equal(torch.where(kept, actual, 0), torch.where(kept, mel, 0))


def test_the_masked_value_is_the_published_zero_before_the_affine_step():
    assert pytest.approx(0.9) == MASKED


@pytest.mark.parametrize("field", ["freq_mask", "time_mask"])
def test_a_mask_wider_than_the_log_mel_is_refused(field):
    with pytest.raises(ConfigError, match=rf"augment\.{field} is 257"):
        augment(AugmentConfig(**{field: 257}))
    size = {"freq_mask": 256, "time_mask": 64}[field]
    widest = augment(AugmentConfig(**{field: size}))
    everything = replace(draw(widest, 1), **{field: torch.tensor([[float(size), 0.99]])})
    assert (widest.mel(noise(1, 1, 256, 64), everything) == MASKED).all()


# -- Freq-MixStyle --


def statistics(mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(mel.double(), dim=(1, 3))
    return (variance + 1e-6).sqrt(), mean


@settings(max_examples=40)
@given(
    clips=st.integers(1, 8),
    shape=st.tuples(st.integers(1, 2), st.just(5), st.integers(2, 12)),
    p=st.floats(0.01, 1.0),
    alpha=st.floats(0.05, 10.0),
    seed=st.integers(0, 1000),
)
def test_freq_mixstyle_leaves_the_mixed_statistics(clips, shape, p, alpha, seed):
    ours = augment(AugmentConfig(freq_mixstyle=FreqMixStyleConfig(p=p, alpha=alpha)))
    mixed = draw(ours, clips, seed)
    mel = noise(clips, *shape, seed=seed) * (0.5 + torch.rand(clips, 1, 5, 1, generator=seeded(seed))) + 1
    actual = ours.mel(mel, mixed)
    sigma, mean = statistics(mel)
    weight = mixed.style_weight.double()[:, None]
    sigma_mix = weight * sigma + (1 - weight) * sigma[mixed.style_partner]
    mean_mix = weight * mean + (1 - weight) * mean[mixed.style_partner]
    torch.testing.assert_close(statistics(actual)[1], mean_mix, rtol=0, atol=1e-5)
    # eps stands in the denominator only: what was var becomes var / (var + eps) * sigma_mix^2
    after = (sigma.square() - 1e-6) / sigma.square() * sigma_mix.square()
    torch.testing.assert_close(statistics(actual)[0].square() - 1e-6, after, rtol=1e-4, atol=1e-6)
    untouched = mixed.style_weight == 1
    assert torch.equal(actual[untouched], mel[untouched])


def test_freq_mixstyle_limits():
    mel = noise(16, 1, 256, 10)

    def mix(p: float, alpha: float) -> tuple[torch.Tensor, Draw]:
        ours = augment(AugmentConfig(freq_mixstyle=FreqMixStyleConfig(p=p, alpha=alpha)))
        mixed = draw(ours, 16)
        return ours.mel(mel, mixed), mixed

    never, _ = mix(0.0, 0.3)
    assert torch.equal(never, mel)
    halves, mixed = mix(1.0, 1e12)
    torch.testing.assert_close(mixed.style_weight, torch.full((16,), 0.5))
    mean = statistics(mel)[1]
    torch.testing.assert_close(statistics(halves)[1], (mean + mean[mixed.style_partner]) / 2, rtol=0, atol=1e-5)
    either, mixed = mix(1.0, 1e-9)
    assert set(mixed.style_weight.tolist()) == {0.0, 1.0}
    swapped = mixed.style_weight == 0
    assert torch.equal(either[~swapped], mel[~swapped])
    torch.testing.assert_close(statistics(either)[1][swapped], mean[mixed.style_partner][swapped], rtol=0, atol=1e-5)


def test_freq_mixstyle_is_drawn_per_clip():
    ours = augment(AugmentConfig(freq_mixstyle=FreqMixStyleConfig(p=0.4, alpha=0.4)))
    mixed = draw(ours, 10_000)
    share = (mixed.style_weight < 1).float().mean().item()
    assert abs(share - 0.4) < 0.03  # a weight may round to 1: Beta(0.4, 0.4) is steep there
    assert sorted(mixed.style_partner.tolist()) == list(range(10_000))


def test_masks_come_before_freq_mixstyle():
    """As published: a masked band has its clip's constant value, and takes part in the statistics."""
    ours = augment(AugmentConfig(freq_mask=200, freq_mixstyle=FreqMixStyleConfig(p=1.0)))
    both = draw(ours, 8)
    mel = noise(8, 1, 256, 16)
    masks_only = augment(AugmentConfig(freq_mask=200))
    mixing_only = augment(AugmentConfig(freq_mixstyle=FreqMixStyleConfig(p=1.0)))
    masked = masks_only.mel(mel, draw(masks_only, 8))
    assert torch.equal(ours.mel(mel, both), mixing_only.mel(masked, draw(mixing_only, 8)))


# -- mixup --


def test_mixup_mixes_the_waveforms_with_the_weights_that_the_targets_get():
    ours = augment(AugmentConfig(mixup_alpha=0.3))
    mixed = draw(ours, 16)
    wave = noise(16, 300)
    lam = mixed.lam[:, None]
    torch.testing.assert_close(ours.wave(wave, mixed), lam * wave + (1 - lam) * wave[mixed.partner])
    assert sorted(mixed.partner.tolist()) == list(range(16))
    assert len(mixed.lam.unique()) == 16
    assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()


@pytest.mark.parametrize("config", [EVERYTHING, AugmentConfig(), EVERYTHING.model_copy(update={"dir": DirConfig()})])
def test_a_draw_is_packed_exactly(config):
    """One copy takes it to a device, as numbers of one kind: every choice comes back as it was."""
    drawn = draw(augment(config), 32)
    packed = drawn.packed()
    assert packed.shape == (32, drawn.width)
    back = drawn.unpacked(packed)
    assert same(drawn, back)
    pairs = [(getattr(drawn, field.name), getattr(back, field.name)) for field in fields(Draw)]
    assert [a.dtype for a, _ in pairs if a is not None] == [b.dtype for _, b in pairs if b is not None]


@pytest.mark.parametrize(
    "section",
    [
        {"roll": -1},
        {"dir": {"p": 1.1}},
        {"dir": {"threshold": "mean"}},
        {"dir": {"threshold": -1.0}},
        {"dir": {"apply_to": "a"}},
        {"dir": {"apply_to": []}},
        {"freq_mixstyle": {"alpha": 0.0}},
        {"mixup_alpha": -0.1},
        {"time_masks": 3},
    ],
)
def test_settings_out_of_range_are_refused(section):
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(section)
