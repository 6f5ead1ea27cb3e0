"""A synthetic corpus in the TAU22 layout: ten scenes of sound textures, nine devices, impulse responses for DIR.

It makes shifts between places and devices show: a place has its own pitch, pace, density and level, every second holds
some of another scene, and each device is a fixed chain (frequency response, compressor, noise floor), mild for a b c,
strong for s1..s6. As in TAU22, most training clips are of `a`, s4 s5 s6 occur in the test split only, and every test
second occurs on all nine devices. Its figures say nothing about real places.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asc_ray.data.config import DemoConfig
from asc_ray.errors import UserError

RATE = 44_100  # samples a second, and samples of a clip
TRAIN_DEVICES = ("a", "b", "c", "s1", "s2", "s3")
DEVICES = (*TRAIN_DEVICES, "s4", "s5", "s6")
TRAIN_SHARES = (0.65, 0.07, 0.07, 0.07, 0.07, 0.07)
CITIES = ("northport", "eastham", "southbury", "westfield")
FREQUENCIES = np.fft.rfftfreq(RATE, 1 / RATE)
IR_SAMPLES = 2048


@dataclass(frozen=True)
class Place:
    """The traits in which places of one scene differ; each is uniform in [0, 1)."""

    pitch: float
    pace: float
    density: float
    color: float


# --- building blocks: every signal is (seconds, RATE), every second independent and periodic --------------------------


def _noise(rng: np.random.Generator, n: int, low: float, high: float, slope: float = 0.0) -> np.ndarray:
    """Make Gaussian noise between `low` and `high` Hz, falling by `slope` dB an octave, at an RMS of 1."""
    f = np.maximum(FREQUENCIES, 20.0)
    gain = (f / 1000) ** (-slope / 6.02) / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 8))
    return _unit(np.fft.irfft(np.fft.rfft(rng.standard_normal((n, RATE))) * gain, RATE))


def _ring(train: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Replace every impulse of `train` by `kernel`; what outlasts the second wraps round, as an earlier one's tail."""
    return _unit(np.fft.irfft(np.fft.rfft(train) * np.fft.rfft(kernel, RATE), RATE))


def _sparse(rng: np.random.Generator, n: int, per_second: float) -> np.ndarray:
    """Make impulses of random heights at random times, at least one a second."""
    train = np.zeros((n, RATE))
    for row in train:
        count = 1 + rng.poisson(max(per_second - 1, 0))
        row[rng.integers(0, RATE, count)] = rng.uniform(0.3, 1.0, count)
    return train


def _periodic(rng: np.random.Generator, n: int, period: float, jitter: float) -> np.ndarray:
    """Make impulses `period` seconds apart, each moved by up to `jitter` periods."""
    train = np.zeros((n, RATE))
    for row in train:
        beats = np.arange(rng.uniform(0, period), 1.0, period)
        times = beats + rng.uniform(-jitter, jitter, len(beats)) * period
        row[(times * RATE).astype(int) % RATE] = rng.uniform(0.6, 1.0, len(beats))
    return train


def _partials(seconds: float, frequencies: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Make the sound of a struck body: partials in Hz, each dying with a time constant of `decay` seconds."""
    t = np.arange(int(seconds * RATE)) / RATE
    return (np.exp(-t / decay[:, None]) * np.sin(2 * np.pi * frequencies[:, None] * t)).sum(0)


def _tone(rng: np.random.Generator, n: int, pitch: np.ndarray, harmonics: np.ndarray) -> np.ndarray:
    """Make a periodic wave with the given harmonic amplitudes; `pitch` in Hz is (n, RATE) or (n, 1)."""
    order = np.arange(1, len(harmonics) + 1)
    period = np.linspace(0, 1, 2048, endpoint=False)
    table = (
        harmonics[:, None] * np.sin(2 * np.pi * (order[:, None] * period + rng.uniform(size=(len(order), 1))))
    ).sum(0)
    phase = np.cumsum(np.broadcast_to(pitch, (n, RATE)) / RATE, axis=1) + rng.uniform(size=(n, 1))
    return _unit(table[((phase % 1.0) * len(table)).astype(int)])


def _swell(rng: np.random.Generator, n: int, rate: float, depth: float) -> np.ndarray:
    """Make a slow modulation around 1, `rate` in Hz."""
    t = np.arange(RATE) / RATE
    wave = np.sin(2 * np.pi * (rate * rng.uniform(0.7, 1.4, (n, 1)) * t + rng.uniform(size=(n, 1))))
    return (1 + wave * depth) ** 2


def _unit(x: np.ndarray) -> np.ndarray:
    """Scale each second to an RMS of 1."""
    return x / (np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True)) + 1e-12)


# --- the ten scenes ---------------------------------------------------------------------------------------------------


def _bells(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.74, 3.76])
    bell = _partials(1.0, (300 + 500 * place.pitch) * ratios, (0.25 + 0.4 * place.color) / np.sqrt(ratios + 0.5))
    return _ring(_sparse(rng, n, 1.0 + 2.5 * place.density), bell) + 0.3 * _noise(rng, n, 50, 2000, 4)


def _birds(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    out = 0.35 * _noise(rng, n, 60, 3000, 5)
    for _ in range(2):
        seconds = rng.uniform(0.05, 0.16)
        t = np.arange(int(seconds * RATE)) / RATE
        glide = rng.uniform(-1, 1) * 1200 / seconds
        pitch = 2200 + 2800 * place.pitch + rng.uniform(-500, 500)
        chirp = np.sin(2 * np.pi * (pitch * t + glide * t**2 / 2)) * np.hanning(len(t))
        out += _ring(_sparse(rng, n, 1 + 5 * place.density), chirp)
    return out


def _crowd(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    out = 0.5 * _noise(rng, n, 120, 3500, 3)
    for _ in range(3 + int(3 * place.density)):
        formants = np.array([rng.uniform(350, 800), rng.uniform(1000, 2200)])
        base = 95 + 90 * place.pitch + rng.uniform(-15, 70)
        order = np.arange(1, 25)
        bumps = np.exp(-(((order[:, None] * base - formants) / 180) ** 2)).sum(1)
        glide = base * (1 + 0.1 * np.sin(2 * np.pi * (3 * np.arange(RATE) / RATE + rng.uniform(size=(n, 1)))))
        out += _tone(rng, n, glide, bumps + 0.15 / order) * _swell(rng, n, 3 + 3 * place.pace, 0.9) * 0.4
    return out


def _engine(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    order = np.arange(1, 41)
    harmonics = rng.uniform(0.3, 1.0, len(order)) / order ** (0.4 + 0.6 * place.color)
    pitch = (28 + 35 * place.pitch) * rng.uniform(0.95, 1.05, (n, 1))
    return _tone(rng, n, pitch, harmonics) + 0.5 * _noise(rng, n, 80, 2500, 4)


def _footsteps(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    length = int(0.07 * RATE)
    grit = np.random.default_rng(int(place.color * 1e6)).standard_normal(length)
    thump = _partials(0.07, np.array([70.0, 110 + 120 * place.pitch]), np.array([0.02, 0.015]))
    step = thump + grit * np.exp(-np.arange(length) / RATE / 0.008) * 0.8
    return _ring(_periodic(rng, n, 0.28 + 0.2 * place.pace, 0.06), step) + 0.35 * _noise(rng, n, 60, 5000, 4)


def _machinery(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    partials = (700 + 1100 * place.pitch) * np.array([1.0, 1.58, 2.24, 3.11])
    clank = _partials(0.2, partials, np.array([0.03, 0.025, 0.02, 0.012]))
    hum = _tone(rng, n, np.full((n, 1), 50.0), np.array([0.5, 1.0, 0.2, 0.6]))
    return (
        _ring(_periodic(rng, n, 1 / (6 + 7 * place.pace), 0.02), clank) + 0.4 * hum + 0.3 * _noise(rng, n, 100, 4000, 3)
    )


def _rain(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    drop = _partials(0.01, np.array([1800 + 2500 * place.pitch]), np.array([0.0015]))
    hiss = _noise(rng, n, 800 + 800 * place.color, 11_000, 1)
    return hiss + _ring(_sparse(rng, n, 25 + 80 * place.density), drop) * 0.8


def _surf(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    wash = _noise(rng, n, 150, 2500 + 4000 * place.color, 2.5)
    return wash * _swell(rng, n, 0.4 + 0.6 * place.pace, 0.65) + 0.5 * _noise(rng, n, 40, 300, 3)


def _traffic(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    t = np.arange(RATE) / RATE
    width = 0.15 + 0.2 * place.pace
    passing = np.exp(-(((t - rng.uniform(-0.1, 1.1, (n, 1))) / width) ** 2))
    tyres = _noise(rng, n, 500, 1400 + 1200 * place.color, 1) * passing * 1.2
    motor = _tone(rng, n, (50 + 50 * place.pitch) * (1.05 - 0.1 * passing), 1 / np.arange(1, 13) ** 1.2)
    return tyres + 0.5 * motor + 0.7 * _noise(rng, n, 30, 800, 5)


def _wind(rng: np.random.Generator, n: int, place: Place) -> np.ndarray:
    center = 350 + 600 * place.pitch
    whistle = _noise(rng, n, center * 0.93, center * 1.07) * _swell(rng, n, 0.8 + place.pace, 0.7)
    gusts = _noise(rng, n, 25, 250, 6) * _swell(rng, n, 1.5 + 2 * place.pace, 0.6)
    return gusts + 0.45 * whistle + 0.2 * _noise(rng, n, 100, 6000, 3)


SCENES: dict[str, Callable[[np.random.Generator, int, Place], np.ndarray]] = {
    "bells": _bells,
    "birds": _birds,
    "crowd": _crowd,
    "engine": _engine,
    "footsteps": _footsteps,
    "machinery": _machinery,
    "rain": _rain,
    "surf": _surf,
    "traffic": _traffic,
    "wind": _wind,
}


def _record(rng: np.random.Generator, scene: str, seconds: int) -> np.ndarray:
    """Make (seconds, RATE) of one place of the scene, with another scene behind it and a level of its own."""
    behind = rng.choice([name for name in SCENES if name != scene])
    wanted = _unit(SCENES[scene](rng, seconds, Place(*rng.uniform(size=4))))
    other = _unit(SCENES[behind](rng, seconds, Place(*rng.uniform(size=4))))
    murmur = _noise(rng, seconds, 40, 9000, rng.uniform(2, 5))
    ratio = 10 ** (-rng.uniform(1, 14, (seconds, 1)) / 20)
    level = 10 ** (-(rng.uniform(20, 34) + rng.uniform(-2, 2, (seconds, 1))) / 20)
    return _unit(wanted + ratio * other + 0.3 * murmur) * level


# --- devices ----------------------------------------------------------------------------------------------------------


def _response(rng: np.random.Generator, bins: int, strong: bool) -> np.ndarray:
    """Draw the gain of a microphone at `bins` frequencies from 0 to RATE / 2: band edges and a smooth curve."""
    f = np.maximum(np.linspace(0, RATE / 2, bins), 20.0)
    low, high = (rng.uniform(100, 350), rng.uniform(4500, 9500)) if strong else (rng.uniform(30, 80), 14_000.0)
    knots = np.linspace(0, np.log2(RATE / 2 / 20), 9)
    curve = np.interp(np.log2(f / 20), knots, rng.normal(0, 6.0 if strong else 2.0, len(knots)))
    return 10 ** (curve / 20) / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 6))


class _Device:
    """A fixed recording chain; `a` leaves the sound as it is."""

    def __init__(self, name: str, seed: int):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, DEVICES.index(name))))
        self.plain, self.strong = name == "a", name.startswith("s")
        self.response = _response(rng, len(FREQUENCIES), self.strong)
        self.ratio = rng.uniform(1.5, 3.0)
        self.floor = 10 ** (-(rng.uniform(22, 35) if self.strong else rng.uniform(42, 50)) / 20)

    def __call__(self, rng: np.random.Generator, clips: np.ndarray) -> np.ndarray:
        """Record clips (n, RATE) and return (n, RATE), at the level that came in."""
        if self.plain:
            return clips
        level = np.sqrt(np.mean(np.square(clips), axis=-1, keepdims=True))
        wet = _unit(np.fft.irfft(np.fft.rfft(clips) * self.response, RATE))
        if self.strong:  # compressor: 20 ms envelope, threshold at the clip's RMS, no make-up gain
            window = np.fft.rfft(np.full(RATE // 50, 50 / RATE), RATE)
            envelope = np.sqrt(np.maximum(np.fft.irfft(np.fft.rfft(np.square(wet)) * window, RATE), 1e-6))
            wet = _unit(wet * np.maximum(envelope, 1.0) ** (1 / self.ratio - 1))
        hiss = np.fft.irfft(np.fft.rfft(rng.standard_normal(clips.shape)) * np.sqrt(self.response), RATE)
        return _unit(wet + self.floor * _unit(hiss)) * level


def _impulse_response(rng: np.random.Generator) -> np.ndarray:
    """Draw the minimum-phase response (IR_SAMPLES,) of a strong microphone, with a short decay of its room."""
    log_gain = np.log(_response(rng, IR_SAMPLES + 1, strong=True) + 1e-4)
    cepstrum = np.fft.irfft(log_gain)
    cepstrum[1:IR_SAMPLES] *= 2  # folding the cepstrum makes the phase minimal
    cepstrum[IR_SAMPLES + 1 :] = 0
    direct = np.fft.irfft(np.exp(np.fft.rfft(cepstrum)))[:IR_SAMPLES]
    decay = np.exp(-np.arange(IR_SAMPLES) / RATE / rng.uniform(0.002, 0.008))
    room = rng.standard_normal(IR_SAMPLES) * decay * rng.uniform(0.0, 0.05) * np.abs(direct).max()
    return 0.9 * (direct + room) / np.abs(direct + room).max()


# --- the corpus -------------------------------------------------------------------------------------------------------


def make_demo_corpus(out: Path, config: DemoConfig) -> None:
    """Write the corpus into `out`: audio/, meta.csv, evaluation_setup/ and dirs/ (impulse responses for DIR).

    The same configuration gives the same bytes; the default makes 800 training and 900 test clips (150 MB). Raises
    UserError where `out` is a file, or a folder with more than hidden files in it.
    """
    if out.exists() and (not out.is_dir() or any(out.glob("[!.]*"))):
        raise UserError(f"{out}: exists and is not an empty folder; name a new folder for the demo corpus")
    for folder in ("audio", "evaluation_setup", "dirs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    devices = {name: _Device(name, config.seed) for name in DEVICES}
    meta, train, test = [], [], []

    def write(stem: str, scene: str, at: str, device: str, clip: np.ndarray) -> tuple[str, str]:
        name = f"audio/{stem}-{device}.wav"
        _write_wav(out / name, np.rint(np.clip(clip, -1, 1) * 32767).astype(np.int16), "PCM_16")
        meta.append((name, scene, at, device))
        return name, scene

    for scene_index, scene in enumerate(SCENES):
        for split, clips, places in (
            ("train", config.train_clips_per_scene, config.train_places_per_scene),
            ("test", config.test_seconds_per_scene, config.test_places_per_scene),
        ):
            for place, seconds in enumerate(map(len, np.array_split(np.arange(clips), places))):
                if not seconds:
                    continue
                key = (0 if split == "train" else 1, scene_index, place)
                rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key))
                number = 1000 * (split == "test") + len(SCENES) * place + scene_index
                at = f"{CITIES[place % len(CITIES)]}-{number}"
                sound = _record(rng, scene, seconds)
                if split == "train":
                    chosen = rng.choice(TRAIN_DEVICES, size=seconds, p=TRAIN_SHARES)
                    for second, device in enumerate(chosen):
                        clip = devices[device](rng, sound[second : second + 1])[0]
                        train.append(write(f"{scene}-{at}-{number}-{second}", scene, at, device, clip))
                    continue
                recorded = {name: device(rng, sound) for name, device in devices.items()}
                for second in range(seconds):
                    for device in DEVICES:
                        stem = f"{scene}-{at}-{number}-{second}"
                        test.append(write(stem, scene, at, device, recorded[device][second]))

    for index in range(config.impulse_responses):
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(3, index)))
        # Not FLOAT: libsndfile puts the time of writing into a float file.
        _write_wav(out / "dirs" / f"microphone-{index:02d}.wav", _impulse_response(rng), "PCM_24")
    _write_table(out / "meta.csv", ("filename", "scene_label", "identifier", "source_label"), meta)
    _write_table(out / "evaluation_setup" / "fold1_train.csv", ("filename", "scene_label"), train)
    _write_table(out / "evaluation_setup" / "fold1_test.csv", ("filename",), [row[:1] for row in test])
    _write_table(out / "evaluation_setup" / "fold1_evaluate.csv", ("filename", "scene_label"), test)


def _write_wav(file: Path, samples: np.ndarray, subtype: str) -> None:
    """Write the samples (N,). What the disk does raises OSError with its reason, which libsndfile does not tell."""
    import soundfile as sf  # here, because reading a configuration does not need it

    whole = io.BytesIO()
    sf.write(whole, samples, RATE, subtype=subtype, format="WAV")
    file.write_bytes(whole.getvalue())


def _write_table(file: Path, header: tuple[str, ...], rows: list) -> None:
    with file.open("w", newline="", encoding="utf-8") as sink:
        csv.writer(sink, delimiter="\t", lineterminator="\n").writerows([header, *rows])
