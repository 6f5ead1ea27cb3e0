"""Time the teachers' training steps: PaSST against a plain implementation, and three seeds of a CP-ResNet at once.

    python bench/teachers.py [--batch 4] [--runs 5] [--threads N] [--only passt|stacked]

A step is forward, backward and AdamW on log-mels of one second, on the CPU (bench/gpu.py has a GPU's figures). The
plain PaSST has the same weights, separate products for q, k and v, and attention written out. It sends every patch
through the blocks; a second figure has our patchout. The forms take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap

from asc_ray.models.config import CPResNetConfig, PasstConfig
from asc_ray.models.passt import Attention, Passt
from asc_ray.models.registry import build

SEEDS = 3
FRAMES = 100


class PlainAttention(nn.Module):
    """A direct implementation of attention, with our weights."""

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


def step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    choices = model.choices(FRAMES, torch.Generator().manual_seed(0)) if isinstance(model, Passt) else ()

    def run() -> None:
        nn.functional.cross_entropy(model(x, *choices), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def stacked(x: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a step of three CP-ResNets with stacked weights, each on its own batch with its own statistics."""
    models = [replace_all_batch_norm_modules_(build(CPResNetConfig(), 10, seed)) for seed in range(SEEDS)]
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


def timed(forms: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Return the seconds of `runs` calls of each form, in turns, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(runs + 1):
        for name, function in forms.items():
            start = time.perf_counter()
            function()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]], clips: int) -> None:
    """Print the clips/s of each form, and the first one's gain over the others."""
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
    parser.add_argument("--only", choices=("passt", "stacked"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{options.threads} CPU thread(s)"
    target = torch.arange(options.batch) % 10
    passt_mel = torch.randn(options.batch, 1, 128, FRAMES)
    mel = torch.randn(options.batch, 1, 256, 43).contiguous(memory_format=torch.channels_last)

    if options.only in (None, "passt"):
        models = {"ours": build(PasstConfig(), 10), "plain, every patch": plain(0), "plain, patchout 6": plain(6)}
        forms = {name: step(model.train(), passt_mel, target) for name, model in models.items()}
        report(f"PaSST-S, batch {options.batch}, {where}", timed(forms, options.runs), options.batch)
    if options.only in (None, "stacked"):
        alone = [step(build(CPResNetConfig(), 10, seed).train(), mel, target) for seed in range(SEEDS)]

        def one_after_another() -> None:
            for run in alone:
                run()

        forms = {"stacked weights": stacked(mel, target), "one after another": one_after_another}
        title = f"{SEEDS} seeds of CP-ResNet, batch {options.batch} each, {where}"
        report(title, timed(forms, options.runs), SEEDS * options.batch)


if __name__ == "__main__":
    main()
