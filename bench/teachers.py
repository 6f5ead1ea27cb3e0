"""The teachers' training steps: PaSST beside a plain implementation, and three seeds of a CP-ResNet at once.

    python bench/teachers.py [--batch 4] [--runs 5] [--threads N] [--only passt|cp_resnet|stacked]

A step is forward, backward and AdamW on log-mels of one second. The plain PaSST has the same weights, products for q, k
and v of their own, attention written out, float32, and sends every patch through the blocks (a second figure: with our
patchout). On a GPU ours runs in bf16 as the loop does, and the share of the peak is printed for --peak TFLOP/s, counted
as 28.6 GFLOP a clip of forward and backward with patchout 6. The forms take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap

from asc_ray.models.cp_resnet import CPResNetConfig
from asc_ray.models.passt import Attention, Passt, PasstConfig
from asc_ray.models.registry import build
from asc_ray.training.loop import training_device

GFLOP_A_CLIP = 28.6
SEEDS = 3


class PlainAttention(nn.Module):
    """Attention by the book, with the weights of ours."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.heads = ours.heads
        width = ours.proj.in_features
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        for layer, weight, bias in zip(
            (self.q, self.k, self.v), ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True
        ):
            layer.load_state_dict({"weight": weight, "bias": bias})
        self.proj = ours.proj

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def plain(patchout: int) -> nn.Module:
    model = build(PasstConfig(patchout_freq=patchout), 10)
    for block in model.blocks:
        block.attn = PlainAttention(block.attn)
    return model


def step(model: nn.Module, x: Tensor, target: Tensor, bf16: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=x.device.type == "cuda")

    def run() -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(x, torch.Generator().manual_seed(0)) if getattr(model, "stochastic", False) else model(x)
        nn.functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def stacked(x: Tensor, target: Tensor) -> Callable[[], None]:
    """Three CP-ResNets as one with stacked weights, each on a batch of its own; statistics of its batch alone."""
    models = [replace_all_batch_norm_modules_(build(CPResNetConfig(), 10, seed).to(x.device)) for seed in range(SEEDS)]
    parameters, buffers = stack_module_state(models)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)
    batches = x.expand(SEEDS, *x.shape)

    def one(weights: dict[str, Tensor], state: dict[str, Tensor], mel: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(models[0], (weights, state), (mel,)), target)

    def run() -> None:
        vmap(one)(parameters, buffers, batches).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def timed(forms: dict[str, Callable[[], None]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each form, in turns, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(runs + 1):
        for name, function in forms.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]], clips: int) -> None:
    """Clips/s of each form, and the first one's gain over the others."""
    print(title)
    first = next(iter(times.values()))
    for name, spent in times.items():
        ratios = sorted(b / a for a, b in zip(first, spent, strict=True))
        print(
            f"  {name:32} {clips / statistics.median(spent):9.1f} clips/s; "
            f"ratio {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("passt", "cp_resnet", "stacked"))
    parser.add_argument("--peak", type=float, default=989.0, help="bf16 TFLOP/s of the GPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = training_device(float(torch.cuda.is_available()))
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"{options.threads} CPU thread(s)"
    target = torch.arange(options.batch, device=device) % 10
    passt_mel = torch.randn(options.batch, 1, 128, 100, device=device)
    mel = torch.randn(options.batch, 1, 256, 43, device=device).contiguous(memory_format=torch.channels_last)

    if options.only in (None, "passt"):
        ours = build(PasstConfig(), 10)
        assert isinstance(ours, Passt)
        models = {"ours": ours, "plain, every patch": plain(0), "plain, patchout 6": plain(6)}
        forms = {
            name: step(model.to(device).train(), passt_mel, target, gpu and name == "ours")
            for name, model in models.items()
        }
        times = timed(forms, options.runs, device)
        report(f"PaSST-S, batch {options.batch}, {where}", times, options.batch)
        if gpu:
            share = options.batch / statistics.median(times["ours"]) * GFLOP_A_CLIP / 1e3 / options.peak
            print(f"  {100 * share:.1f} % of {options.peak:g} bf16 TFLOP/s")
    if options.only in (None, "cp_resnet") and gpu:
        model = build(CPResNetConfig(), 10).to(device, memory_format=torch.channels_last).train()
        report(
            f"CP-ResNet, batch {options.batch}, {where}",
            timed({"ours": step(model, mel, target, True)}, options.runs, device),
            options.batch,
        )
    if options.only in (None, "stacked"):
        alone = [
            step(build(CPResNetConfig(), 10, seed).to(device).train(), mel, target, False) for seed in range(SEEDS)
        ]

        def one_after_another() -> None:
            for run in alone:
                run()

        forms = {"stacked weights": stacked(mel, target), "one after another": one_after_another}
        report(
            f"{SEEDS} seeds of CP-ResNet, batch {options.batch} each, {where}",
            timed(forms, options.runs, device),
            SEEDS * options.batch,
        )


if __name__ == "__main__":
    main()
