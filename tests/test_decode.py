"""Decoding of recordings, and resampling against soxr and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.audio import recording
from asc_ray.audio.recording import _read
from asc_ray.audio.resample import fft_size, resample
from asc_ray.data import decode as decode_module
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE
from asc_ray.data.decode import BadAudio, Notes, decode

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10"


def write(path: Path, samples, rate=SAMPLE_RATE, subtype="FLOAT", **options) -> Path:
    sf.write(path, np.asarray(samples, dtype=np.float64), rate, subtype=subtype, **options)
    return path


def sine(rate: int, seconds=1.0, frequency=1000.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def decode_one(path: Path) -> tuple[np.ndarray, Notes]:
    """PCM and notes; raises what is wrong with the clip."""
    out = np.full((1, CLIP_SAMPLES), 7, dtype=np.int16)
    result = decode([path], out)[0]
    if isinstance(result, BadAudio):
        raise result
    return out[0], result


# --- resampling -------------------------------------------------------------------------------------------------------

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_056, 44_100, 48_000, 88_200, 96_000, 192_000]


def decibels(error, reference) -> float:
    return 10 * np.log10(np.square(error).sum() / np.square(reference).sum())


@pytest.mark.parametrize("rate", RATES)
def test_resampling_is_soxr_hq(rate):
    noise = np.random.default_rng(rate).standard_normal(rate)
    ours = resample(torch.from_numpy(noise).float()[None], rate, SAMPLE_RATE)[0].numpy()
    # soxr drops what its filter makes of the first few samples at odd ratios, unless something comes before them.
    lead = rate // np.gcd(rate, SAMPLE_RATE) * max(1, 2000 * np.gcd(rate, SAMPLE_RATE) // rate)
    padded = soxr.resample(np.r_[np.zeros(lead), noise, np.zeros(lead)], rate, SAMPLE_RATE, quality="HQ")
    reference = padded[lead * SAMPLE_RATE // rate :][:CLIP_SAMPLES]
    assert ours.shape == (CLIP_SAMPLES,)
    assert decibels(ours - reference, reference) < -115


@pytest.mark.parametrize("rate", RATES)
def test_resampling_gives_the_same_tones_at_the_new_rate(rate):
    def tones(at: int) -> np.ndarray:  # silent at both ends, up to 0.6 of the lower Nyquist frequency
        time = np.arange(at) / at
        frequencies = np.linspace(0.02, 0.6, 25) * min(rate, SAMPLE_RATE) / 2
        return np.exp(-(((time - 0.5) / 0.12) ** 2)) * np.sin(2 * np.pi * np.outer(frequencies, time)).mean(axis=0)

    ours = resample(torch.from_numpy(tones(rate)).float()[None], rate, SAMPLE_RATE)[0].numpy()
    assert decibels(ours - tones(SAMPLE_RATE), tones(SAMPLE_RATE)) < -80


@pytest.mark.parametrize(("rate", "target"), [(44_100, 32_000), (8_000, 32_000), (48_000, 44_100)])
def test_nothing_wraps_around(rate, target):
    """An impulse at one end must not be heard at the other."""
    wave = torch.zeros(2, rate)
    wave[0, 0] = wave[1, -1] = 1.0
    first, last = resample(wave, rate, target)
    assert first[target // 2 :].abs().max() < 1e-5
    assert last[: target // 2].abs().max() < 1e-5


@given(least=st.integers(2, 200_000))
def test_fft_sizes_are_even_smooth_and_least(least):
    def smooth(number: int) -> bool:
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    size = fft_size(least)
    assert size >= least
    assert size % 2 == 0
    assert smooth(size)
    assert not any(smooth(number) for number in range(least + least % 2, size, 2))


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_16_bit_clip_at_32_khz_is_kept_bit_for_bit(tmp_path):
    pcm = np.random.default_rng(0).integers(-32768, 32768, CLIP_SAMPLES).astype(np.int16)
    sf.write(tmp_path / "x.wav", pcm, SAMPLE_RATE, subtype="PCM_16")
    decoded, notes = decode_one(tmp_path / "x.wav")
    assert (decoded == pcm).all()
    assert notes == {}


FORMATS = [
    ("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_32"), ("wav", "PCM_U8"), ("wav", "FLOAT"), ("wav", "DOUBLE"),
    ("flac", "PCM_16"), ("flac", "PCM_24"), ("ogg", "VORBIS"), ("aiff", "PCM_24"), ("wavex", "PCM_24"),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_every_format_decodes_to_what_soundfile_reads(tmp_path, kind, subtype, channels):
    rng = np.random.default_rng(1)
    samples = np.round(rng.uniform(-0.3, 0.3, (SAMPLE_RATE, channels)) * 2**23) / 2**23
    path = write(tmp_path / f"x.{kind.removesuffix('x')}", samples, subtype=subtype, format=kind.upper())
    expected = sf.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    decoded, notes = decode_one(path)
    assert (decoded == np.rint(expected * 32768)).all()
    assert notes == ({} if channels == 1 else {"stereo mixed down" if channels == 2 else "5 channels mixed down": 1})


@settings(max_examples=30)
@given(rate=st.sampled_from([2_000, 8_000, 11_025, 37_800, 44_100, 48_000, 192_000]), channels=st.integers(1, 3))
def test_every_rate_and_channel_count(tmp_path_factory, rate, channels):
    path = tmp_path_factory.mktemp("rates") / "x.wav"
    write(path, np.stack([sine(rate, frequency=300)] * channels, axis=1), rate, "PCM_24")
    decoded, notes = decode_one(path)
    middle = slice(1000, -1000)  # the filter rings where the sine begins and ends
    assert np.abs(decoded / 32768 - sine(SAMPLE_RATE, frequency=300))[middle].max() < 1e-3
    assert notes[f"resampled {rate} Hz"] == 1


def test_a_clip_does_not_depend_on_the_others_beside_it(tmp_path):
    """Many rates and lengths at once, more than there are open batches, and bad clips between them."""
    rng = np.random.default_rng(2)
    paths = []
    for index in range(60):
        rate = [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 37_800, 44_100, 48_000, 96_000][index * 7 % 10]
        seconds = rng.uniform(0.8 if index % 9 == 0 else 0.91, 1.09)
        noise = rng.uniform(-0.5, 0.5, round(rate * seconds))
        paths.append(write(tmp_path / f"{index}.wav", noise, rate, ["PCM_16", "PCM_24", "FLOAT"][index % 3]))
    out = np.empty((60, CLIP_SAMPLES), dtype=np.int16)
    for path, row, result in zip(paths, out, decode(paths, out), strict=True):
        if isinstance(result, BadAudio):
            with pytest.raises(BadAudio, match=f"^{result}$"):
                decode_one(path)
        else:
            alone, notes = decode_one(path)
            assert np.abs(alone.astype(int) - row).max() <= 1  # another batch size may round the last bit otherwise
            assert notes == result


def test_stereo_is_the_mean_of_the_channels(tmp_path):
    left, right = sine(SAMPLE_RATE, frequency=300), sine(SAMPLE_RATE, frequency=700)
    decoded, notes = decode_one(write(tmp_path / "x.wav", np.stack([left, right], 1)))
    assert notes == {"stereo mixed down": 1}
    assert np.abs(decoded - 32768 * (left + right) / 2).max() <= 0.51


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
@pytest.mark.parametrize(("seconds", "note"), [(0.95, "padded"), (1.05, "cropped")])
def test_small_differences_in_length_are_mended(tmp_path, seconds, note, rate):
    decoded, notes = decode_one(write(tmp_path / "x.wav", sine(rate, seconds), rate))
    own = min(round(seconds * SAMPLE_RATE), CLIP_SAMPLES)
    expected = sine(SAMPLE_RATE, seconds)[:own]
    assert notes[note] == 1
    assert np.abs(decoded[1000 : own - 1000] - 32768 * expected[1000 : own - 1000]).max() <= 8
    assert not decoded[own:].any()


def test_beyond_full_scale_is_clipped_and_counted(tmp_path):
    wave = sine(SAMPLE_RATE, amplitude=1.5)
    decoded, notes = decode_one(write(tmp_path / "x.wav", wave))
    rounded = np.rint(wave.astype(np.float32) * 32768)
    assert notes == {"clipped": 1, "samples clipped": int(((rounded > 32767) | (rounded < -32768)).sum())}
    assert (decoded == np.clip(rounded, -32768, 32767)).all()


NAN = sine(SAMPLE_RATE)
NAN = np.where(np.arange(len(NAN)) < 3, np.nan, NAN)
BAD = {
    "not a wav": (lambda p: p.write_bytes(b"RIFF nonsense"), "unreadable"),
    "absent": (lambda p: None, "unreadable"),
    "a folder": (lambda p: p.mkdir(), "unreadable"),
    "empty": (lambda p: p.write_bytes(b""), "unreadable"),
    "no samples": (lambda p: write(p, np.zeros(0)), "no samples"),
    "silent": (lambda p: write(p, np.zeros(CLIP_SAMPLES)), "silent"),
    "below half a bit": (lambda p: write(p, 1e-6 * sine(SAMPLE_RATE)), "silent"),
    "opposite channels": (lambda p: write(p, np.stack([sine(SAMPLE_RATE), -sine(SAMPLE_RATE)], 1)), "silent"),
    "NaN": (lambda p: write(p, NAN), "3 samples are not finite"),
    "infinite": (lambda p: write(p, np.where(np.isnan(NAN), np.inf, NAN)), "not finite"),
    "too short": (lambda p: write(p, sine(SAMPLE_RATE, 0.85)), "0.85 s"),
    "too long": (lambda p: write(p, sine(SAMPLE_RATE, 1.2)), "1.20 s"),
    "cut off": (
        lambda p: write(p, sine(SAMPLE_RATE), subtype="PCM_16") and p.write_bytes(p.read_bytes()[:30_000]),
        "cut short: 14978 of 32000 samples",
    ),
    "16-bit values as float": (lambda p: write(p, 3000 * sine(SAMPLE_RATE)), r"up to 1500: .* within \+-1; divide 16"),
    "quiet 16-bit values as float": (lambda p: write(p, np.rint(12 * sine(SAMPLE_RATE))), "up to 6: .* divide 16-bit"),
    "far beyond full scale": (lambda p: write(p, 20 * sine(SAMPLE_RATE)), "up to 10: .* within"),
    "a constant": (lambda p: write(p, np.full(CLIP_SAMPLES, 0.25)), "silent: all samples are equal"),
    "channels that almost cancel": (
        lambda p: write(p, np.stack([sine(SAMPLE_RATE), -1.01 * sine(SAMPLE_RATE)], 1)),
        "silent: its channels cancel each other",
    ),
    "too low a rate": (lambda p: write(p, np.ones(999), 999), "a rate of 999 Hz; allowed are 1000 to 1000000 Hz"),
    "too high a rate": (lambda p: with_rate(p, 1_000_000_000), "a rate of 1000000000 Hz; allowed"),
    "too high a rate, float": (lambda p: with_rate(p, 1_000_000_000, "FLOAT"), "a rate of 1000000000 Hz; allowed"),
}


def with_rate(path: Path, rate: int, subtype="PCM_16") -> None:
    write(path, sine(SAMPLE_RATE), subtype=subtype)
    path.write_bytes(path.read_bytes().replace(SAMPLE_RATE.to_bytes(4, "little"), rate.to_bytes(4, "little"), 1))


@pytest.mark.parametrize("case", BAD)
def test_bad_audio_is_refused_with_a_reason(tmp_path, case):
    make, reason = BAD[case]
    make(tmp_path / "x.wav")
    with pytest.raises(BadAudio, match=reason):
        decode_one(tmp_path / "x.wav")


def test_audio_over_an_hour_is_not_read(tmp_path, monkeypatch):
    write(tmp_path / "x.wav", np.zeros(200_000) + 0.1, 8000, "PCM_16")
    write(tmp_path / "x.flac", np.zeros(200_000) + 0.1, 8000, "PCM_16")
    read = []
    monkeypatch.setattr(recording, "_read", lambda file, out: (read.append(len(out)), _read(file, out))[1])
    monkeypatch.setattr(decode_module._PcmWav, "samples", lambda *_: pytest.fail("read"))
    for name in ("x.wav", "x.flac"):
        with pytest.raises(BadAudio, match=r"25\.00 s long"):
            decode_one(tmp_path / name)
    assert sum(read) <= 1.2 * 8000


@pytest.mark.skipif(not REAL.is_dir(), reason="no real recordings here")
def test_real_recordings_are_soxrs_within_a_bit(tmp_path):
    for source in sorted(REAL.rglob("*.ogg"))[:20]:
        wave, rate = sf.read(source, dtype="float64", always_2d=True)
        path = write(tmp_path / f"{source.stem}.wav", wave[rate : 2 * rate, 0], rate, "PCM_24")
        try:
            decoded, _ = decode_one(path)
        except BadAudio as error:
            assert "silent" in str(error)  # noqa: PT017
            continue
        reference = soxr.resample(sf.read(path, dtype="float32")[0], rate, SAMPLE_RATE, quality="HQ")
        difference = np.abs(decoded - np.clip(np.rint(reference * 32768), -32768, 32767))
        assert difference[8:].max() <= 1
