"""Our audio code against torchaudio's, and the page that puts one beside the other."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT
from reference import FRONT_ENDS, waves

from asc_ray.audio.augment import Augment, Draw
from asc_ray.audio.config import MASKED, AugmentConfig, DirConfig, FrontendConfig, KaldiFbankConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.audio.kaldi import KaldiFbank
from asc_ray.audio.resample import resample
from asc_ray.runtime.frontend import mel_bank

sys.path.insert(0, str(ROOT / "bench"))
from torchaudio_cpu import import_torchaudio

try:
    torchaudio = import_torchaudio()
except ImportError as error:
    pytest.skip(f"torchaudio does not import: {error}", allow_module_level=True)

BANK = ImpulseBank.load(None)


def augment(**settings) -> Augment:
    return Augment(AugmentConfig(**settings), FrontendConfig(), BANK, mean_energy=1.0)


def drawn(augment: Augment, clips: int) -> Draw:
    return augment.draw(torch.ones(clips), ["a"] * clips, torch.Generator().manual_seed(0))


def kaldi_bank(c: FrontendConfig) -> torch.Tensor:
    """(mels, n_fft // 2); the last three numbers are the defaults of a warp that is not done."""
    return torchaudio.compliance.kaldi.get_mel_banks(
        c.mels, c.n_fft, c.sample_rate, c.fmin, c.fmax, 100.0, -500.0, 1.0
    )[0]


# -- front end --


@pytest.mark.parametrize("config", [*FRONT_ENDS.values(), FrontendConfig(fmin=50.0, mels=40)])
def test_the_mel_bank_is_kaldi_s(config):
    ours = torch.from_numpy(mel_bank(config.sample_rate, config.n_fft, config.mels, config.fmin, config.fmax))
    torch.testing.assert_close(ours, kaldi_bank(config), rtol=0, atol=5e-5)


@pytest.mark.parametrize("config", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_the_mel_bank_hears_the_same_frequencies_as_htk_s(config):
    """MelSpectrogram's default triangles are straight in Hz and Kaldi's in mel; their feet are the same."""
    ours = torch.from_numpy(mel_bank(config.sample_rate, config.n_fft, config.mels, config.fmin, config.fmax))
    htk = torchaudio.functional.melscale_fbanks(
        config.n_fft // 2 + 1, config.fmin, config.fmax, config.mels, config.sample_rate, norm=None, mel_scale="htk"
    ).T[:, :-1]
    assert torch.equal(ours > 1e-4, htk > 1e-4)
    torch.testing.assert_close(ours, htk, rtol=0, atol=5e-3)


@pytest.mark.parametrize("config", FRONT_ENDS.values(), ids=FRONT_ENDS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 1, 2)], ids=str)
def test_the_log_mel_is_torchaudio_s_with_kaldi_s_bank(config, leading):
    wave = waves(2, 4, 1)[: int(np.prod(leading))].view(*leading, 32_000)
    emphasized = torchaudio.functional.preemphasis(wave, 0.97)[..., 1:]  # whose first sample has none before it
    power = torchaudio.transforms.Spectrogram(config.n_fft, config.window, config.hop, wkwargs={"periodic": False})(
        emphasized
    )
    expected = ((kaldi_bank(config) @ power[..., :-1, :] + 1e-5).log() + 4.5) / 5
    torch.testing.assert_close(LogMel(config)(wave), expected, rtol=0, atol=1e-4)


# BEATs, AST and EAT, and what else Kaldi knows.
FBANKS = {
    "AST": {},
    "BEATs": {"window_type": "povey", "scale": 32768.0, "mean": 15.41663, "std": 6.55582},
    "few wide bins": {"window_type": "hamming", "mels": 23, "fmin": 50.0, "fmax": 7000.0},
    "22.05 kHz": {"sample_rate": 22_050, "window": 551, "hop": 220, "fmax": 11_025.0},
    "32 kHz": {"sample_rate": 32_000, "window": 1024, "hop": 320, "fmax": 16_000.0, "window_type": "rectangular"},
}


@pytest.mark.parametrize("leading", [(4,), (20, 1), ()], ids=str)
@pytest.mark.parametrize("settings", FBANKS.values(), ids=FBANKS)
def test_the_log_filter_bank_is_kaldi_s(settings, leading):
    config = KaldiFbankConfig(kind="kaldi_fbank", **settings)
    wave = waves(2, max(1, int(np.prod(leading))), 1)
    at_rate = wave if config.sample_rate == 32_000 else resample(wave, 32_000, config.sample_rate)
    expected = torch.stack(
        [
            torchaudio.compliance.kaldi.fbank(
                clip[None] * config.scale,
                sample_frequency=config.sample_rate,
                frame_length=1000 * config.window / config.sample_rate + 1e-6,
                frame_shift=1000 * config.hop / config.sample_rate + 1e-6,
                window_type=config.window_type,
                num_mel_bins=config.mels,
                low_freq=config.fmin,
                high_freq=config.fmax,
                htk_compat=True,
                dither=0.0,
            )
            for clip in at_rate
        ]
    )
    expected = ((expected - config.mean) / (2 * config.std)).transpose(1, 2)
    ours = KaldiFbank(config)(wave.view(*leading, 32_000))
    assert ours.shape == (*leading, *config.shape(32_000)[1:])
    torch.testing.assert_close(ours.reshape(expected.shape), expected, rtol=0, atol=1e-4)


def test_silence_has_kaldi_s_least_logarithm():
    config = KaldiFbankConfig(kind="kaldi_fbank")
    expected = torchaudio.compliance.kaldi.fbank(torch.zeros(1, 16_000), num_mel_bins=128, window_type="hanning")
    ours = KaldiFbank(config)(torch.zeros(1, 32_000))[0] * 2 * config.std + config.mean
    torch.testing.assert_close(ours, expected.T, rtol=0, atol=1e-4)


# -- masks --


@pytest.mark.parametrize(("field", "axis"), [("freq_mask", 2), ("time_mask", 3)])
def test_a_mask_is_torchaudio_s_for_the_same_width_and_start(field, axis):
    mel = torch.randn(64, 1, 256, 64, generator=torch.Generator().manual_seed(1))
    size = mel.shape[axis]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torchaudio.functional.mask_along_axis_iid(mel, 21, MASKED, axis)
        torch.manual_seed(5)  # what it has drawn: a width, and a start among those where the band has room
        width = torch.rand(64, 1) * 21
        start = (torch.rand(64, 1) * (size - width)).floor()
    width = width.floor()
    ours = augment(**{field: 20})
    given = torch.cat([width, (start + 0.5) / (size - width + 1)], dim=1)
    draw = replace(drawn(ours, 64), **{field: given})
    assert torch.equal(ours.mel(mel, draw), expected)
    assert len(width.unique()) > 10


def bands(masked: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(B, 1, F, T) of zeros and masked ones -> widths (B,) and the centres of those that are there, in 0..1."""
    rows = masked[:, 0, :, 0].bool()
    width, start = rows.sum(1), rows.int().argmax(1)
    return width.numpy(), ((start + width / 2) / rows.shape[1])[width > 0].numpy()


def test_masks_are_drawn_as_torchaudio_draws_them():
    """Its widest mask is one narrower than its parameter says, and it spares the last bin."""
    clips, flat = 4000, torch.zeros(4000, 1, 256, 2)
    ours = augment(freq_mask=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torchaudio.functional.mask_along_axis_iid(flat, 21, 1.0, 2)
    masked = ours.mel(flat, drawn(ours, clips))
    assert not theirs[:, :, -1].any()
    assert masked[:, :, -1].any()
    found, expected = bands(masked), bands(theirs)
    for widths in (found[0], expected[0]):
        assert scipy.stats.chisquare(np.bincount(widths, minlength=21)).pvalue > 1e-3
        assert widths.max() == 20
    assert scipy.stats.ks_2samp(found[1], expected[1]).pvalue > 1e-3


# -- impulse responses and other rates --


def test_dir_is_torchaudio_s_convolution():
    ours, wave = augment(dir=DirConfig(p=1.0)), waves(3, 6, 1)
    draw = drawn(ours, 6)
    responses = BANK.responses[draw.response]
    expected = torchaudio.functional.fftconvolve(wave, responses)[:, :32_000]
    torch.testing.assert_close(ours.wave(wave, draw), expected, rtol=0, atol=1e-5)
    direct = torchaudio.functional.convolve(wave[:1, :6000], responses[:1])[:, :6000]  # what follows changes nothing
    torch.testing.assert_close(ours.wave(wave, draw)[:1, :6000], direct, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_is_torchaudio_s_in_the_passband(rate):
    """Tones up to 0.8 of the lower Nyquist frequency, against a filter as long as soxr's; 44.1 kHz is soxr's worst."""
    time = np.arange(rate) / rate
    hertz = np.linspace(0.02, 0.8, 25) * min(rate, 32_000) / 2
    tones = np.exp(-(((time - 0.5) / 0.12) ** 2)) * np.sin(2 * np.pi * np.outer(hertz, time)).mean(axis=0)
    wave = torch.from_numpy(tones).float()[None]
    expected = torchaudio.functional.resample(wave, rate, 32_000, lowpass_filter_width=64)
    found = resample(wave, rate, 32_000)
    assert found.shape == expected.shape
    error = (found - expected).square().sum() / expected.square().sum()
    assert 10 * error.log10() < (-75 if rate == 44_100 else -85)


# -- the page --


def test_the_page_that_puts_torchaudio_beside_ours_is_true():
    file = ROOT / "docs" / "torchaudio.md"
    page, names = file.read_text(), {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert sum("assert" in block[1] for block in blocks) >= 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            above = page[: block.start(1)].count("\n")
            exec(compile("\n" * above + block[1], str(file), "exec"), names)
