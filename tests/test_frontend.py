"""The log-mel front end against the published systems' outputs and against the definition, term by term."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import FRONT_ENDS, RENEW, SOUNDS, golden, mel_digest, needs_reference, published_outputs, waves

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.runtime.frontend import mel_bank

SMALL = FrontendConfig(sample_rate=8000, n_fft=64, window=48, hop=20, mels=12, fmax=3500.0, fmax_jitter=400.0)


def noise(clips: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(seed))


def bank_of(config: FrontendConfig) -> torch.Tensor:
    return torch.from_numpy(mel_bank(config.sample_rate, config.n_fft, config.mels, config.fmin, config.fmax))


def by_definition(wave: np.ndarray, config: FrontendConfig, fmax: float) -> np.ndarray:
    """One clip in float64, every DFT term and every triangle written out."""
    wave = wave[1:] - 0.97 * wave[:-1]
    pad = config.n_fft // 2
    padded = np.concatenate([wave[1 : pad + 1][::-1], wave, wave[-pad - 1 : -1][::-1]])
    window = np.zeros(config.n_fft)
    left = (config.n_fft - config.window) // 2
    index = np.arange(config.window)
    window[left : left + config.window] = 0.5 - 0.5 * np.cos(2 * np.pi * index / (config.window - 1))

    time = np.arange(config.n_fft)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(config.n_fft // 2 + 1), time) / config.n_fft)
    starts = range(0, len(wave) + 2 * pad - config.n_fft + 1, config.hop)
    power = np.stack([np.abs(dft @ (window * padded[start : start + config.n_fft])) ** 2 for start in starts], axis=1)

    def mel(hertz: float) -> float:
        return 1127 * np.log(1 + hertz / 700)

    step = (mel(fmax) - mel(config.fmin)) / (config.mels + 1)
    bank = np.zeros((config.mels, config.n_fft // 2 + 1))
    for row in range(config.mels):
        left_edge = mel(config.fmin) + row * step
        for column in range(config.n_fft // 2):
            position = (mel(column * config.sample_rate / config.n_fft) - left_edge) / step
            bank[row, column] = max(0.0, min(position, 2 - position))
    return (np.log(bank @ power + 1e-5) + 4.5) / 5


@pytest.mark.parametrize("system", FRONT_ENDS)
def test_agrees_with_digests_of_the_published_system(system):
    expected = golden("published")[system]["mel"]
    assert expected.keys() == SOUNDS.keys()
    for sound, digests in expected.items():
        found = mel_digest(LogMel(FRONT_ENDS[system])(waves(*SOUNDS[sound])))
        np.testing.assert_allclose(found, digests, rtol=0, atol=1e-4, err_msg=RENEW)


@needs_reference
@pytest.mark.parametrize("system", FRONT_ENDS)
def test_agrees_with_the_published_system(system):
    mels = dict(published_outputs(system, "mel"))
    assert mels.keys() == SOUNDS.keys()
    for sound, expected in mels.items():
        actual = LogMel(FRONT_ENDS[system])(waves(*SOUNDS[sound]))
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("samples", "shift"), [(400, 0.0), (401, 150.0), (399, -200.0)])
def test_agrees_with_the_definition(samples, shift):
    wave = noise(3, samples)
    actual = LogMel(SMALL)(wave, torch.full((3,), shift))
    assert actual.shape == (3, SMALL.mels, SMALL.frames(samples))
    expected = np.stack([by_definition(clip, SMALL, SMALL.fmax + shift) for clip in wave.double().numpy()])
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-5)


@settings(max_examples=30)
@given(window=st.integers(2, 64), hop=st.integers(1, 70), samples=st.integers(80, 200))
def test_any_window_and_hop_agree_with_torch_stft(window, hop, samples):
    config = SMALL.model_copy(update={"window": window, "hop": hop})
    wave = noise(2, samples)
    emphasized = wave[:, 1:] - 0.97 * wave[:, :-1]
    hann = torch.hann_window(window, periodic=False)
    spectrum = torch.stft(emphasized, 64, hop, window, hann, center=True, return_complex=True)
    mel = bank_of(config) @ spectrum[:, :-1].abs().square()
    torch.testing.assert_close(LogMel(config)(wave), ((mel + 1e-5).log() + 4.5) / 5, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", FRONT_ENDS.values(), ids=FRONT_ENDS.keys())
def test_triangles_add_up_to_one_between_the_outer_centres(config):
    bank = bank_of(config)
    assert (bank.sum(1) > 0).all(), "every mel bin hears something"
    assert (bank.count_nonzero(0) <= 2).all()
    first, last = int(bank[0].argmax()) + 1, int(bank[-1].argmax())
    torch.testing.assert_close(bank[:, first:last].sum(0), torch.ones(last - first))


def test_silence_is_the_floor_of_the_logarithm():
    mel = LogMel(FrontendConfig())(torch.zeros(1, 32_000))
    torch.testing.assert_close(mel, torch.full((1, 256, 64), float((np.log(1e-5) + 4.5) / 5)))


@pytest.mark.parametrize("leading", [(), (3,), (6, 1), (2, 3), (1, 2, 3)])
def test_any_leading_shape_stays_in_front(leading):
    wave = noise(math.prod(leading), 400).view(*leading, 400)
    mel = LogMel(SMALL)(wave)
    assert mel.shape == (*leading, SMALL.mels, SMALL.frames(400))
    for at in np.ndindex(leading):
        torch.testing.assert_close(mel[at], LogMel(SMALL)(wave[at]), rtol=0, atol=1e-6)


def test_a_clip_does_not_depend_on_its_batch():
    wave = noise(7, 4000)
    before, front_end = wave.clone(), LogMel(FrontendConfig())
    torch.testing.assert_close(front_end(wave)[5:6], front_end(wave[5:6]), rtol=0, atol=1e-6)
    assert torch.equal(wave, before), "the input is left as it is"


@pytest.mark.parametrize(
    "settings", [{}, {"n_fft": 1024, "window": 800, "hop": 320, "mels": 128}, {"fmax_jitter": 0.0}]
)
def test_the_bank_of_a_gpu_is_the_same_bank(settings):
    """There all shifted banks lie in wider groups, and a tensor says which one is meant."""
    config = FrontendConfig.model_validate(settings)
    ours = LogMel(config)
    squares = torch.rand(5, config.n_fft, generator=torch.Generator().manual_seed(0))
    shifts = (-500.0, -50.0, 0.0, 500.0) if config.fmax_jitter else (0.0,)
    for shift in shifts:
        mels = [
            torch.cat([squares[:, start:stop] @ weights for start, stop, weights in bank], dim=1)
            for bank in (ours._bank(shift), ours._bank_there(torch.device("cpu"), torch.tensor([shift])))
        ]
        torch.testing.assert_close(*mels)
    unshifted, zero = (ours._bank_there(torch.device("cpu"), shift) for shift in (None, torch.zeros(1)))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(unshifted, zero, strict=True))


def test_a_shift_is_another_upper_edge_and_stops_at_nyquist():
    wave = noise(2, 4000)
    front_end = LogMel(FrontendConfig())
    shifted = LogMel(FrontendConfig(fmax=15_000.0))(wave)
    assert torch.equal(front_end(wave, torch.full((2,), -500.0)), shifted)
    assert torch.equal(front_end(wave, torch.full((2,), 5000.0)), LogMel(FrontendConfig(fmax=16_000.0))(wave))
    assert not torch.equal(front_end(wave), shifted)


def test_checkpoints_hold_nothing_of_the_front_end():
    assert not LogMel(FrontendConfig()).state_dict()


def test_a_clip_too_short_to_reflect_is_refused():
    with pytest.raises(ValueError, match="1000 samples is too short"):
        LogMel(FrontendConfig())(torch.zeros(1, 1000))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 5000}, "window 5000 must not exceed n_fft 4096"),
        ({"fmax": 16_001.0}, "half the sample rate"),
        ({"fmin": 15_500.0}, "fmin 15500.0 < fmax 15500.0"),
        ({"fmin": 15_100.0}, "fmax_jitter 1000.0 moves fmax"),
        ({"n_fft": 4095}, "multiple of 2"),
        ({"hop_length": 500}, "hop_length"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        FrontendConfig(**fields)
