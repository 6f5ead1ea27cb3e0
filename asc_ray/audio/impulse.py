"""Impulse responses of recording devices, for the convolution augmentations DIR and ADIR (eq. 3)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asc_ray.audio.resample import resample
from asc_ray.audio.responses import response_files
from asc_ray.errors import UserError
from asc_ray.files import open_plain

SYNTHETIC = 32
_SYNTHETIC_SEED = 2022
_SYNTHETIC_SECONDS = 0.125


@dataclass(frozen=True, eq=False)
class ImpulseBank:
    """Named impulse responses at one sample rate; `responses` is (N, L) float32, zeros after each response's end."""

    names: tuple[str, ...]
    responses: Tensor

    @classmethod
    def load(cls, folder: Path | None, sample_rate: int = 32_000) -> "ImpulseBank":
        """Load every *.wav of `folder` in the order of the names, or for None the built-in synthetic bank.

        Channels are averaged and other rates are resampled once (soxr HQ). The level stays the file's own, as in the
        published code: eq. 3 has no gain, and how loud a device records is part of what distinguishes it.

        Raises UserError if the folder is missing or has no *.wav, and if files are unreadable, empty, silent or not
        finite; it names all of them.
        """
        return _synthetic(sample_rate) if folder is None else _read(Path(folder), sample_rate)


def _read(folder: Path, sample_rate: int) -> ImpulseBank:
    import soundfile  # here, because a training on stored clips does not need it

    from asc_ray.audio.recording import BadAudio, check_rate

    paths = response_files(folder)
    responses: list[Tensor] = []
    refused: list[str] = []
    for path in paths:
        try:
            open_plain(path).close()
            samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
            check_rate(rate)
        except (soundfile.LibsndfileError, OSError) as error:
            refused.append(f"{path.name}: unreadable ({error})")
            continue
        except BadAudio as error:
            refused.append(f"{path.name}: {error}")
            continue
        mono = samples.mean(axis=1)
        if not np.isfinite(mono).all():
            refused.append(f"{path.name}: holds values that are not finite")
            continue
        response = torch.from_numpy(mono).float()
        if rate != sample_rate:
            response = resample(response[None], rate, sample_rate)[0]
        if not response.any():
            refused.append(f"{path.name}: {'silent' if len(response) else 'empty'} at {sample_rate} Hz")
            continue
        responses.append(response)
    if refused:
        raise UserError(f"impulse responses in {folder} cannot be used; mend or remove:\n  " + "\n  ".join(refused))
    return ImpulseBank(tuple(path.stem for path in paths), torch.nn.utils.rnn.pad_sequence(responses, batch_first=True))


def _synthetic(sample_rate: int) -> ImpulseBank:
    """Make SYNTHETIC microphones, the same in every run; a stand-in for measured ones such as MicIRP's.

    Each is a minimum-phase band-pass with a few resonances, followed by a short, faint, exponentially decaying room
    tail as that microphone would hear it. Unit energy: white noise keeps its level.
    """
    rng = np.random.default_rng(_SYNTHETIC_SEED)
    samples = round(_SYNTHETIC_SECONDS * sample_rate)
    responses = np.stack([_microphone(rng, samples, sample_rate) for _ in range(SYNTHETIC)])
    names = tuple(f"synthetic_{index:02d}" for index in range(SYNTHETIC))
    return ImpulseBank(names, torch.from_numpy(responses).float())


def _microphone(rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    size = 4 * samples  # room for the cepstrum and the tail to fade before they wrap around
    hertz = np.maximum(np.fft.rfftfreq(size, 1 / sample_rate), 1.0)
    low, high = rng.uniform(40, 300), sample_rate * rng.uniform(0.15, 0.45)
    order = rng.integers(1, 4)
    gain = -10 * np.log10(1 + (low / hertz) ** (2 * order)) - 10 * np.log10(1 + (hertz / high) ** (2 * order))  # dB
    for _ in range(rng.integers(3, 7)):
        octaves = np.log2(hertz / np.exp(rng.uniform(np.log(100), np.log(0.4 * sample_rate))))
        gain += rng.uniform(-9, 9) * np.exp(-0.5 * (octaves / rng.uniform(0.1, 0.8)) ** 2)
    spectrum = _minimum_phase(gain * np.log(10) / 20)

    time = np.arange(samples) / sample_rate
    tail = rng.standard_normal(samples) * 10 ** (-3 * time / rng.uniform(0.03, 0.12))  # 60 dB down after 30..120 ms
    tail[: round(0.002 * sample_rate)] = 0.0  # the first reflection comes after 2 ms
    tail *= 10 ** (rng.uniform(-30, -12) / 20) / np.linalg.norm(tail)
    tail[0] = 1.0
    response = np.fft.irfft(spectrum * np.fft.rfft(tail, size))[:samples]
    return response / np.linalg.norm(response)


def _minimum_phase(log_magnitude: np.ndarray) -> np.ndarray:
    """Return the spectrum (rfft bins) of this log magnitude with the earliest energy: fold its cepstrum to t >= 0."""
    cepstrum = np.fft.irfft(log_magnitude)
    half = len(cepstrum) // 2
    cepstrum[1:half] *= 2
    cepstrum[half + 1 :] = 0
    return np.exp(np.fft.rfft(cepstrum))
