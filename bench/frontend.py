"""Compare the log-mel front end with a plain one and torchaudio's, per core, and resampling with torchaudio's.

    python bench/frontend.py [--batch 64] [--runs 15] [--threads 1]

The plain front end makes the library calls of the published code: pre-emphasis, torch.stft, power, matrix product with
the whole bank, log, affine. It computes the same log-mel (the largest difference is printed). torchaudio's
MelSpectrogram is timed without the steps before and after it, and its triangles are straight in Hz. torchaudio
resamples recordings of 44.1 kHz with its default filter, and with one as long as soxr's, which ours has. All get the
same noise and take turns. Without torchaudio its rows are left out. bench/gpu.py has the figures of a GPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torchaudio_cpu import import_torchaudio

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.resample import resample
from asc_ray.runtime.frontend import mel_bank

FRONT_ENDS = {
    "student": FrontendConfig(),
    "CP-ResNet": FrontendConfig(hop=750),
    "PaSST": FrontendConfig(n_fft=1024, window=800, hop=320, mels=128),
}


class Plain:
    def __init__(self, config: FrontendConfig) -> None:
        self.config = config
        self.window = torch.hann_window(config.window, periodic=False)
        bank = torch.from_numpy(mel_bank(config.sample_rate, config.n_fft, config.mels, config.fmin, config.fmax))
        self.bank = torch.nn.functional.pad(bank, (0, 1))

    def __call__(self, wave: torch.Tensor) -> torch.Tensor:
        config = self.config
        wave = wave[:, 1:] - 0.97 * wave[:, :-1]
        spectrum = torch.stft(
            wave, config.n_fft, config.hop, config.window, self.window, center=True, return_complex=True
        )
        power = torch.view_as_real(spectrum).square().sum(dim=-1)
        return ((self.bank @ power + 1e-5).log() + 4.5) / 5.0


def compare(
    name: str,
    ours: Callable[[torch.Tensor], torch.Tensor],
    others: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    wave: torch.Tensor,
    runs: int,
    remark: str = "",
) -> None:
    """Print clips/s, and the median, least and greatest ratio of each other form's time to ours."""

    def seconds(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
        start = time.perf_counter()
        function(wave)
        return time.perf_counter() - start

    turns = [[seconds(function) for function in (ours, *others.values())] for _ in range(runs + 2)][2:]
    rate, *rates = (len(wave) / statistics.median(times) for times in zip(*turns, strict=True))
    print(f"{name:10} {rate:8.0f} clips/s{remark}")
    for number, (other, its) in enumerate(zip(others, rates, strict=True), start=1):
        ratios = sorted(turn[number] / turn[0] for turn in turns)
        low, high = ratios[0], ratios[-1]
        print(f"  {other:24} {its:8.0f}; ratio {statistics.median(ratios):.2f}, from {low:.2f} to {high:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wave = 0.1 * torch.randn(options.batch, 32_000, generator=torch.Generator().manual_seed(0))
    where = f"{options.threads} of {os.cpu_count()} cores"
    print(f"batches of {options.batch} clips, {options.runs} runs, {where}, torch {torch.__version__}")

    try:
        transforms = import_torchaudio().transforms
    except ImportError as error:
        transforms = None
        print(f"without torchaudio: {error}")

    for name, config in FRONT_ENDS.items():
        others: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"plain": Plain(config)}
        if transforms:
            c = config
            others["torchaudio"] = transforms.MelSpectrogram(
                c.sample_rate, c.n_fft, c.window, c.hop, c.fmin, c.fmax, n_mels=c.mels, wkwargs={"periodic": False}
            )
        difference = (LogMel(config)(wave) - others["plain"](wave)).abs().max()
        compare(name, LogMel(config), others, wave, options.runs, f"; largest difference to plain {difference:.1e}")
    if transforms:
        wave = 0.1 * torch.randn(options.batch, 44_100, generator=torch.Generator().manual_seed(0))
        others = {
            "torchaudio": transforms.Resample(44_100, 32_000),
            "torchaudio, long filter": transforms.Resample(44_100, 32_000, lowpass_filter_width=64),
        }
        compare("44.1 kHz", lambda wave: resample(wave, 44_100, 32_000), others, wave, options.runs)


if __name__ == "__main__":
    main()
