"""The log-mel front end beside a plain one (torch.stft, then a dense mel matrix), per core, in one run.

    python bench/frontend.py [--batch 64] [--runs 15] [--threads 1]

The plain one is what the published code does with library calls: pre-emphasis, torch.stft, power, matrix product with
the whole bank, log, affine. Both compute the same log-mel (the largest difference is printed) of the same noise, taking
turns. A card's figures are bench/gpu.py's.
"""

import argparse
import os
import statistics
import time

import torch

from asc_ray.audio.frontend import FrontendConfig, LogMel
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

    def seconds(function) -> float:
        start = time.perf_counter()
        function(wave)
        return time.perf_counter() - start

    for name, config in FRONT_ENDS.items():
        ours, plain = LogMel(config), Plain(config)
        difference = (ours(wave) - plain(wave)).abs().max()
        pairs = [(seconds(ours), seconds(plain)) for _ in range(options.runs + 2)][2:]
        ratios = sorted(b / a for a, b in pairs)
        a, b = (options.batch / statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{name:10} {a:8.0f} clips/s, plain {b:8.0f}; ratio {statistics.median(ratios):.2f}, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}; largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
