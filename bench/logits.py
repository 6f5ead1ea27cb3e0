"""Compare the ensemble's inference, six CP-ResNets behind one front end, with one pass a system.

    python bench/logits.py CLIPS [--clips 512] [--systems 6] [--runs 5] [--threads 1]

One pass a system reads the clips, computes the log-mel and runs the network as it was trained, six times. The shared
pass, as in `asc-ray logits`, reads and transforms once, and folds batch norms into the convolutions. They take turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.models.config import CPResNetConfig
from asc_ray.models.registry import build, folded
from asc_ray.training.gpu import training_device
from asc_ray.training.validation import predict, predict_all


def trained(seed: int) -> torch.nn.Module:
    """Return a CP-ResNet with weights and statistics like those of a trained one: its head does not start at zero."""
    model = build(CPResNetConfig(), 10, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--clips", dest="count", type=int, default=512)
    parser.add_argument("--systems", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, store = training_device(float(torch.cuda.is_available())), ClipStore(options.clips)
    rows = np.arange(min(options.count, len(store)))
    front_end = LogMel(FrontendConfig(hop=750)).to(device)
    plain = [trained(seed).to(device, memory_format=torch.channels_last) for seed in range(options.systems)]
    together = [folded(trained(seed)).to(device, memory_format=torch.channels_last) for seed in range(options.systems)]

    def alone() -> torch.Tensor:
        return torch.stack([predict(model, front_end, store, rows, device) for model in plain])

    def shared() -> torch.Tensor:
        return predict_all(together, front_end, store, rows, device)

    difference = float((alone() - shared()).abs().max() / alone().abs().max())
    times: dict[str, list[float]] = {"a pass a system": [], "shared": []}
    for _ in range(options.runs):
        for name, function in zip(times, (alone, shared), strict=True):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    print(
        f"{options.systems} CP-ResNets, {len(rows)} clips, {options.runs} runs, {device}, {options.threads} thread(s)"
    )
    for name, spent in times.items():
        print(f"{name:16} {options.systems * len(rows) / statistics.median(spent):8.1f} logit vectors/s")
    ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
    print(
        f"ratio {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; difference {difference:.1e}"
    )


if __name__ == "__main__":
    main()
