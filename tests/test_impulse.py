"""Banks of impulse responses: files of any rate and channels, the built-in bank, folders that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asc_ray.audio.impulse import SYNTHETIC, ImpulseBank
from asc_ray.errors import UserError

MICIRP = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "dirs"


def test_a_folder_is_read_in_the_order_of_names_with_levels_as_they_are(tmp_path):
    loud, quiet = np.array([0.0, 1.0, 0.5, -0.25]), np.array([0.125, 0.0625])
    soundfile.write(tmp_path / "b.wav", np.stack([quiet, np.zeros(2)], axis=1), 32_000, subtype="FLOAT")
    soundfile.write(tmp_path / "a.WAV", loud, 32_000, subtype="FLOAT")
    (tmp_path / "licence.txt").write_text("not audio")
    bank = ImpulseBank.load(tmp_path)
    assert bank.names == ("a", "b")
    expected = [[0.0, 1.0, 0.5, -0.25], [0.0625, 0.03125, 0.0, 0.0]]  # stereo averaged, zeros after the end
    assert torch.equal(bank.responses, torch.tensor(expected))


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path, rate):
    """A decaying sine keeps its frequency, level and duration in seconds."""

    def response(rate: int) -> np.ndarray:
        time = np.arange(rate // 4) / rate
        return np.exp(-30 * time) * np.sin(2 * np.pi * 1000 * time)

    soundfile.write(tmp_path / "ir.wav", response(rate), rate, subtype="FLOAT")
    actual = ImpulseBank.load(tmp_path).responses[0].numpy()
    assert abs(len(actual) - 8000) <= 1
    np.testing.assert_allclose(actual[50:7900], response(32_000)[50:7900], atol=2e-3)


def test_the_built_in_bank():
    bank = ImpulseBank.load(None)
    assert bank.responses.shape[0] == len(set(bank.names)) == SYNTHETIC
    assert torch.equal(bank.responses, ImpulseBank.load(None).responses)
    torch.testing.assert_close(bank.responses.square().sum(1), torch.ones(SYNTHETIC))

    spectrum = torch.fft.rfft(bank.responses, n=8192).abs().log10().mul(20)
    hertz = torch.fft.rfftfreq(8192, 1 / 32_000)
    at = {f: int((hertz - f).abs().argmin()) for f in (10, 15_900)}
    middle = spectrum[:, (hertz > 300) & (hertz < 4000)].mean(1)
    assert (spectrum[:, at[10]] < middle - 5).all(), "no microphone hears 10 Hz as well as speech"
    assert (spectrum[:, at[15_900]] - middle).mean() < -5, "and the top is rolled off on the whole"
    assert (bank.responses[:, :32].abs().amax(1) == bank.responses.abs().amax(1)).all(), "the direct sound comes first"
    energy = bank.responses.square().cumsum(1)
    assert (energy[:, 320] > 0.85).all(), "most of it in the first 10 ms"
    assert (energy[:, 2000] < 1 - 1e-6).any(), "and a room after it"
    shapes = spectrum[:, 1:] - spectrum[:, 1:].mean(1, keepdim=True)
    assert torch.pdist(shapes).min() / shapes.shape[1] ** 0.5 > 0.5, "no two within 0.5 dB of each other"


@pytest.mark.skipif(not MICIRP.is_dir(), reason="no measured responses beside the checkout")
def test_the_measured_bank_of_66_microphones():
    bank = ImpulseBank.load(MICIRP)
    assert len(bank.names) == 66
    assert bank.names == tuple(sorted(bank.names))
    assert bank.responses.isfinite().all()
    assert bank.responses.shape[1] <= 16_001, "half a second"


def test_every_file_that_cannot_be_used_is_named(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.ones(10), 32_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF....")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 32_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(10), 44_100)
    soundfile.write(tmp_path / "nan.wav", np.array([0.5, np.nan]), 32_000, subtype="FLOAT")
    with pytest.raises(UserError) as caught:
        ImpulseBank.load(tmp_path)
    message = str(caught.value)
    for part in ("broken.wav: unreadable", "empty.wav: empty", "silent.wav: silent", "nan.wav: holds values"):
        assert part in message
    assert "good.wav" not in message


def test_a_folder_without_responses_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \*.wav"):
        ImpulseBank.load(tmp_path)
    with pytest.raises(UserError, match="absent is not a folder"):
        ImpulseBank.load(tmp_path / "absent")
