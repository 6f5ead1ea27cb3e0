"""Measure the numeric core on a GPU: whether it is right, how fast it is, and how far from the GPU's limits.

    python bench/gpu.py --out DIR [--device cuda|cpu] [--only NAME ...] [--minutes 8]

This needs only torch, numpy, pyarrow, pydantic and safetensors. If torchaudio is installed, its front end is compared;
if torchao is, int8 training is timed. The program makes a clip store of noise, runs the parts below in turn, prints a
table, and writes DIR/gpu.json. Parts for which no minutes are left are named and left out. Without a GPU everything is
smaller, and the times only show that it runs. But the kernels and bytes of a step are counted as on a GPU
(bench/rehearsal.py), and are compared with what an H100 could do at most.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rehearsal import Rehearsal, moved_bytes
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchaudio_cpu import import_torchaudio
from train import AUGMENT
from train import PARTS as RANGES

from asc_ray.audio.augment import Augment
from asc_ray.audio.config import AugmentConfig, FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.data.batches import moved, step_generator, waveform
from asc_ray.data.clip import Clip
from asc_ray.data.clips import CLIP_SAMPLES, SHARD, ClipStore, write_clips
from asc_ray.data.config import DataConfig
from asc_ray.data.pieces import piece_file
from asc_ray.models.registry import build, folded
from asc_ray.training import loop
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Dataset
from asc_ray.training.loop import fit
from asc_ray.training.validation import predict_all

SCENES, DEVICES = 10, ("a", "b", "c", "s1", "s2", "s3")
H100 = 2.97e12, 7.86e14  # bytes/s of a copy and FLOP/s of a product in bf16, measured by this program
TAU22 = 139_620, 29_680  # clips for training and for the test
PASST_FRONTEND = {"n_fft": 1024, "window": 800, "hop": 320, "mels": 128}
STUDENTS = ("sm1", "sm2", "sm3", "sm4")
NETWORKS = (*STUDENTS, "cp_mobile", "bsconv_cnn", "dcase22_baseline", "cp_resnet", "passt")
SMALL_PASST = {"width": 96, "depth": 2, "heads": 3}


def recipe(name: str, batch: int, epochs: int, small: bool = False, **changes: Any) -> Recipe:
    """Return a recipe for a network with its own front end, and a student's or a teacher's whole augmentation."""
    settings: dict[str, Any] = {
        "model": {"name": "ds_flexinet", "size": name} if name in STUDENTS else {"name": name},
        "augment": AUGMENT,
        "optimizer": {"epochs": epochs, "batch_size": batch, "schedule": {"warm_up": 0}},
    }
    if name == "cp_resnet":
        settings |= {"frontend": {"hop": 750}, "augment": {"roll": 4000, "freq_mixstyle": {"p": 0.8}, "freq_mask": 48}}
    if name == "dcase22_baseline":
        frontend = {"n_fft": 2048, "window": 1280, "hop": 639, "mels": 40}
        settings |= {"frontend": frontend, "augment": AUGMENT | {"freq_mask": 8}}
    if name == "passt":
        augment = {"roll": 10_000, "freq_mixstyle": {"p": 0.4}, "freq_mask": 48, "time_mask": 20}
        settings |= {"frontend": PASST_FRONTEND, "augment": augment}
        settings["optimizer"]["learning_rate"] = 1e-5
        if small:
            settings["model"] |= SMALL_PASST
    return Recipe.model_validate(settings | changes)


def noise(folder: Path, clips: int) -> Dataset:
    """Make a clip store of noise that is louder from scene to scene; a tenth of it is for validation."""
    rng = np.random.default_rng(0)
    scenes = np.arange(clips) % SCENES
    for start in range(0, clips, 4096):
        some = np.arange(start, min(clips, start + 4096))
        level = 300 * 1.4 ** scenes[some, None]
        pcm = (rng.standard_normal((len(some), CLIP_SAMPLES), dtype=np.float32) * level).astype(np.int16)
        rows = [
            Clip(f"{n}.wav", str(scenes[n]), DEVICES[n // SCENES % len(DEVICES)], f"place-{n % 97}", "train")
            for n in some.tolist()
        ]
        labels = tuple(map(str, range(SCENES)))
        write_clips(piece_file(folder, SHARD, start), rows, pcm, labels, DEVICES, "noise")
    return opened(folder)


def opened(folder: Path) -> Dataset:
    """Open the clip store that `noise` made."""
    store = ClipStore(folder)
    rows = np.arange(len(store))
    parts = {"train": rows[rows % 10 > 0], "validation": rows[rows % 10 == 0][:256]}
    return Dataset(store, parts, ImpulseBank.load(None), DataConfig(), None)


def trained(
    own: Recipe, data: Dataset, clips: int, gpus: float, model: nn.Module | None = None, **arguments: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Run `fit` on the first `clips` clips; return the network, which is new unless given, and its history."""
    if model is None:
        model = build(own.model, SCENES, own.seed)
    with tempfile.TemporaryDirectory() as folder:
        return model, fit(model, own, data, data.parts["train"][:clips], Path(folder), gpus=gpus, **arguments)


class Counted(TorchDispatchMode):
    """Counts the operators that start kernels on a GPU, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.bytes = 0

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Count from zero."""
        self.kernels, self.bytes = [], 0
        with self:
            yield

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        taken, made = (
            [value for value in tree_leaves(tree) if isinstance(value, Tensor)] for tree in ((args, kwargs), result)
        )
        size = moved_bytes(operator, taken, made)
        if size is not None:
            self.kernels.append(operator._schema.name)
            self.bytes += size
        return result


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        self.out, self.only = options.out, options.only
        self.until = time.perf_counter() + 60 * options.minutes
        self.folder = folder
        # This comes before any training, because autograd counts the devices only once.
        self.counting: Counted | Rehearsal = Counted() if self.gpu else Rehearsal()
        self.data = noise(folder, 18_432 if self.gpu else 240)
        self.results: dict[str, Any] = {}
        self.rows: list[tuple[str, str, str]] = []
        self.bandwidth = self.flops = float("nan")

    def row(self, what: str, figure: str, asked: str = "") -> None:
        self.rows.append((what, figure, asked))
        print(f"{what:56} {figure:44} {asked}", flush=True)

    def run(self) -> None:
        for part in PARTS:
            name = part.__name__
            if self.only and name not in self.only and name != "ceilings":
                continue
            if time.perf_counter() > self.until:
                self.row(name, "left out: the minutes are over")
                continue
            start = time.perf_counter()
            try:
                part(self)
            except Exception:  # the next part may still work, and the GPU is available now
                self.row(name, "FAILED: " + traceback.format_exc().strip().splitlines()[-1][:200])
                traceback.print_exc(limit=-6, file=sys.stdout)
            self.results.setdefault("seconds", {})[name] = time.perf_counter() - start
            if self.gpu:
                torch.cuda.empty_cache()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps({"rows": self.rows, **self.results}, indent=1))

    def train(self, own: Recipe, clips: int, **arguments: Any) -> tuple[nn.Module, list[dict[str, float]]]:
        """Call `trained` on this benchmark's device."""
        return trained(own, self.data, clips, float(self.gpu), **arguments)

    def seconds(self, function: Callable[[], object], runs: int = 20) -> float:
        """Return the median seconds of `runs` calls after three; a GPU replays them and times them by its own clock."""
        if not self.gpu:
            function()
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                function()
            times = []
            for _ in range(runs):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


def ceilings(bench: Bench) -> None:
    """Measure how fast the GPU can copy and multiply at most."""
    size = 1 << 30 if bench.gpu else 1 << 26
    source = torch.randn(size // 4, device=bench.device)
    target = torch.empty_like(source)
    bench.bandwidth = 2 * size / bench.seconds(lambda: target.copy_(source))
    side = 8192 if bench.gpu else 1024
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.flops = 2 * side**3 / bench.seconds(lambda: a @ b)
    name = torch.cuda.get_device_name() if bench.gpu else f"CPU, {torch.get_num_threads()} threads"
    bench.results |= {"device": name, "torch": torch.__version__, "bandwidth": bench.bandwidth, "bf16": bench.flops}
    bench.row(
        f"{name}, torch {torch.__version__}",
        f"{bench.bandwidth / 1e12:.2f} TB/s, {bench.flops / 1e12:.0f} bf16 TFLOP/s",
    )


def right(bench: Bench) -> None:
    """Compare each network's losses over 25 steps with the CPU's, in float32, TF32 and bf16.

    An epoch has four whole batches and a short one, and the learning rate falls: the recorded step must follow.
    """
    batch, epochs = 16, 5
    schedule = {"warm_up": 2, "ramp_down_start": 2, "ramp_down_length": 3}
    optimizer = {"epochs": epochs, "batch_size": batch, "schedule": schedule}
    found = bench.results["loss curves"] = {}
    for name in NETWORKS if bench.gpu else ("sm1", "passt"):
        own = recipe(name, batch, epochs, small=True, precision="fp32", optimizer=optimizer)
        _, history = trained(own, bench.data, 4 * batch + 5, gpus=0.0)
        curves = {"cpu": [metrics["loss"] for metrics in history]}
        for precision in ("fp32", "tf32", "bf16") if bench.gpu else ("fp32",):
            _, history = bench.train(own.model_copy(update={"precision": precision}), 4 * batch + 5)
            curves[precision] = [metrics["loss"] for metrics in history]
        found[name] = curves
        distances = {
            precision: max(abs(a - b) / abs(b) for a, b in zip(curve, curves["cpu"], strict=True))
            for precision, curve in curves.items()
            if precision != "cpu"
        }
        figures = ", ".join(f"{precision} {distance:.0e}" for precision, distance in distances.items())
        bench.row(f"losses of 25 steps, {name}: furthest from the CPU's", figures)


def no_waiting(bench: Bench) -> None:
    """Check that no step waits for the GPU, except the first, which makes tables."""
    step = loop.Trainer.step

    def strict(self: Any, *arguments: Any) -> Tensor:
        if self._draw is None:
            return step(self, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    clean = []
    for name in NETWORKS if bench.gpu else ():
        try:
            with patch.object(loop.Trainer, "step", strict):
                bench.train(recipe(name, 32, 1, small=True), 32 * 4)
                with plain_steps():
                    bench.train(recipe(name, 32, 1, small=True), 32 * 4)
            clean.append(name)
        except RuntimeError as error:
            bench.row(f"a step of {name} waits for the card", str(error).splitlines()[0][:100])
    bench.row("no step waits for the card", ", ".join(clean) or "not seen")


class Plain:
    """Replaces `Replayed`: it runs every step kernel by kernel."""

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)


def plain_steps() -> Any:
    """Return a patch that runs steps without recording and replaying them."""
    return patch("asc_ray.training.step.Replayed", Plain)


def same_weights(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of any weight, relative to the largest weight of its tensor in `b`."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in pairs if x.is_floating_point())


def same_again(bench: Bench) -> None:
    """Compare the weights of repeated and of resumed trainings, with deterministic algorithms and without."""
    for name in ("sm2", "cp_mobile", "cp_resnet", "passt") if bench.gpu else ("sm1",):
        for deterministic in (True, False):
            own = recipe(name, 32, 4, small=True, deterministic=deterministic)
            clips = 32 * 6
            first, _ = bench.train(own, clips)
            again, _ = bench.train(own, clips)
            train = bench.data.parts["train"][:clips]
            with tempfile.TemporaryDirectory(dir=bench.folder) as folder:

                def stop(metrics: dict[str, float]) -> None:
                    if metrics["epoch"] == 2:
                        raise KeyboardInterrupt

                resumed = build(own.model, SCENES)
                try:
                    fit(resumed, own, bench.data, train, Path(folder), gpus=float(bench.gpu), on_epoch=stop)
                except KeyboardInterrupt:
                    resumed = build(own.model, SCENES)
                    fit(resumed, own, bench.data, train, Path(folder), gpus=float(bench.gpu))
            figures = f"again {same_weights(again, first):.0e}, resumed {same_weights(resumed, first):.0e}"
            kind = "deterministic" if deterministic else "as it comes"
            bench.row(f"weights of {name}, {kind}: difference", figures, "0" if deterministic else "")


def _rank(rank: int, folder: str, device: str) -> None:
    """Train as one of two processes on one GPU, or alone if `rank` is -1, and write the epochs' losses to a file."""
    own = recipe("cp_resnet", 32, 2, precision="fp32")
    if rank >= 0:
        rendezvous = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    rows = np.arange(224)
    data = replace(opened(Path(folder)), parts={"train": rows[:192], "validation": rows[192:]})
    _, history = trained(own, data, 192, float(device == "cuda"))
    if rank >= 0:
        torch.distributed.destroy_process_group()
    Path(f"{folder}/rank{rank}.json").write_text(json.dumps([metrics["loss"] for metrics in history]))


def ranks(bench: Bench) -> None:
    """Compare two processes on one GPU over gloo with one: torch's SyncBatchNorm, and the whole batch's gradients."""
    _rank(-1, str(bench.folder), bench.device.type)
    torch.multiprocessing.spawn(_rank, (str(bench.folder), bench.device.type), nprocs=2)
    alone, both = (json.loads((bench.folder / f"rank{rank}.json").read_text()) for rank in (-1, 0))
    losses = max(abs(a - b) for a, b in zip(alone, both, strict=True))
    bench.row("two ranks and one, CP-ResNet, 12 steps", f"mean losses differ by {losses:.0e}", "asked: 1e-3")


def step_counts(bench: Bench) -> None:
    """Count the kernels, bytes and FLOP of a step, operator by operator, and the clips/s that they allow.

    Without a GPU PaSST is small, because a CPU takes most of a minute for a step of the whole one in bfloat16.
    """
    batch, count = 64 if bench.gpu else 4, bench.counting
    found = bench.results["steps"] = {}
    compute = loop.Trainer._compute
    data = replace(bench.data, parts=bench.data.parts | {"validation": bench.data.parts["validation"][:2]})
    bandwidth, flops = (bench.bandwidth, bench.flops) if bench.gpu else H100
    for name in ("sm2", "sm4", "cp_mobile", "cp_resnet", "passt"):
        flop = calls = 0

        def counted(self: Any, *arguments: Tensor) -> Tensor:
            """Count the second step, because the first makes tables."""
            nonlocal flop, calls
            calls += 1
            if calls != 2:
                return compute(self, *arguments)
            with FlopCounterMode(display=False) as counter, count.strict():
                result = compute(self, *arguments)
            flop = counter.get_total_flops()
            return result

        with ExitStack() as patched:
            patched.enter_context(plain_steps())
            patched.enter_context(patch.object(loop.Trainer, "_compute", counted))
            if isinstance(count, Rehearsal):
                patched.enter_context(patch.object(loop, "training_device", lambda gpus: count.device))
                patched.enter_context(count)
            trained(recipe(name, batch, 1, small=not bench.gpu), data, 2 * batch, float(bench.gpu))
        kernels = len(count.kernels)
        found[name] = {"kernels": kernels, "bytes": count.bytes / batch, "flop": flop / batch, "batch": batch}
        allowed = 1 / max(count.bytes / batch / bandwidth, flop / batch / flops)
        bench.row(
            f"step of {name}, batch {batch}",
            f"{kernels} kernels; {count.bytes / batch / 1e6:.1f} MB, {flop / batch / 1e9:.3f} GFLOP a clip",
            f"bytes and FLOP allow {allowed:,.0f} clips/s",
        )


def whole_loop(bench: Bench, name: str, batch: int, asked: str = "", plainly: bool = False, **changes: Any) -> float:
    """Return the clips/s of `fit`, the median of the epochs after the first; the row also has the memory."""
    steps = 40 if name == "passt" else 64
    epochs, clips = (3 if plainly else 4, min(steps * batch, 16_384)) if bench.gpu else (2, 2 * batch)
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with plain_steps() if plainly else nullcontext():
        _, history = bench.train(recipe(name, batch, epochs, small=not bench.gpu, **changes), clips)
    spent = time.perf_counter() - start - sum(metrics["seconds"] for metrics in history)
    rate = statistics.median(metrics["clips_per_second"] for metrics in history[1:])
    memory = f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB" if bench.gpu else ""
    how = ["kernel by kernel"] * plainly + [
        key if value is True else f"{key} {value}" for key, value in changes.items()
    ]
    label = ", ".join([f"training {name}, batch {batch}", *how])
    bench.row(label, f"{rate:,.0f} clips/s; {spent:.0f} s before the first epoch; {memory}", asked)
    bench.results.setdefault("training", {})[label] = [metrics["clips_per_second"] for metrics in history]
    if steps := bench.results.get("steps", {}).get(name):
        floor = max(steps["bytes"] / bench.bandwidth, steps["flop"] / bench.flops)
        bench.results["training"][f"{label}, of the floor"] = floor * rate
    return rate


def students(bench: Bench) -> None:
    for batch in (64, 256, 1024) if bench.gpu else (8,):
        whole_loop(bench, "sm2", batch, plainly=True)
        augmentation_share(bench, batch, whole_loop(bench, "sm2", batch, "asked: 40,000" if batch == 256 else ""))
    for name in ("sm4", "cp_mobile") if bench.gpu else ("sm4",):
        whole_loop(bench, name, 256 if bench.gpu else 8)
    whole_loop(bench, "sm2", 256 if bench.gpu else 8, deterministic=True)


def compiled(bench: Bench) -> None:
    """Time trainings with torch.compile, and list the kernels of a step, compiled or not, with the profiler."""
    if not bench.gpu:
        return
    kernels_of(bench, "sm2", 256)
    for name, batch in (("sm2", 256), ("sm2", 64), ("sm4", 256), ("passt", 80), ("passt", 256)):
        rate = whole_loop(bench, name, batch, "asked: 35 %" if name == "passt" else "", compile=True)
        if name == "passt":
            bf16_share(bench, rate)
        if (name, batch) == ("sm2", 256):
            augmentation_share(bench, batch, rate)
    for name, batch in (("sm2", 256), ("passt", 80)):
        kernels_of(bench, name, batch, compile=True)


def kernels_of(bench: Bench, name: str, batch: int, **changes: Any) -> None:
    """List the kernels that eight steps start on the GPU, and how long each takes."""
    compute = loop.Trainer._compute
    profiler = profile(activities=[ProfilerActivity.CUDA])
    calls = 0

    def watched(self: Any, *arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            torch.cuda.synchronize()
            profiler.start()
        result = compute(self, *arguments)
        if calls == 9:
            torch.cuda.synchronize()
            profiler.stop()
        return result

    with plain_steps(), patch.object(loop.Trainer, "_compute", watched):
        bench.train(recipe(name, batch, 1, **changes), 10 * batch)
    events = [event for event in profiler.key_averages() if event.self_device_time_total and event.key not in RANGES]
    events.sort(key=lambda event: -event.self_device_time_total)
    spent, count = sum(event.self_device_time_total for event in events) / 8e3, sum(event.count for event in events) / 8
    label = ", ".join([f"{name}, batch {batch}", *changes])
    bench.row(f"kernels of a step of {label}", f"{count:.0f}, {spent:.2f} ms together")
    rows = [(event.key[:160], event.count / 8, event.self_device_time_total / 8e3) for event in events]
    bench.results.setdefault("kernels", {})[label] = rows[:40]


def front_ends(bench: Bench) -> None:
    batch = 256 if bench.gpu else 16
    wave = 0.1 * torch.randn(batch, CLIP_SAMPLES, device=bench.device)
    shift = torch.full((batch,), 150.0, device=bench.device)
    for name, config in {
        "student": FrontendConfig(),
        "CP-ResNet": FrontendConfig(hop=750),
        "PaSST": FrontendConfig.model_validate(PASST_FRONTEND),
    }.items():
        front_end = LogMel(config).to(bench.device)
        reference = LogMel(config)(wave[:4].cpu(), shift[:4].cpu())
        worst = float((front_end(wave[:4], shift[:4]).cpu() - reference).abs().max())
        rate = batch / bench.seconds(lambda front_end=front_end: front_end(wave, shift))
        other = torchaudio_rate(bench, config, wave)
        bytes_least = CLIP_SAMPLES * 2 + config.mels * config.frames(CLIP_SAMPLES) * 4
        bench.row(
            f"front end, {name}",
            f"{rate:,.0f} clips/s, {worst:.0e} from the CPU's{other}",
            ("asked: 200,000; " if name == "student" else "") + f"floor {bench.bandwidth / bytes_least:,.0f}",
        )


def torchaudio_rate(bench: Bench, config: FrontendConfig, wave: Tensor) -> str:
    try:
        torchaudio = import_torchaudio()
    except ImportError:
        return ""
    theirs = torchaudio.transforms.MelSpectrogram(
        config.sample_rate, config.n_fft, config.window, config.hop, config.fmin, config.fmax, n_mels=config.mels
    ).to(bench.device)
    rate = len(wave) / bench.seconds(lambda: theirs(wave).add_(1e-5).log_())
    return f"; torchaudio's {rate:,.0f}"


def augmentation_seconds(bench: Bench, batch: int) -> float:
    """Return the seconds a clip for fetching from the resident split, converting and augmenting on the device."""
    augment = Augment(AugmentConfig.model_validate(AUGMENT), FrontendConfig(), bench.data.bank, 1.0)
    pcm = torch.zeros(2 * batch, CLIP_SAMPLES, dtype=torch.int16, device=bench.device)
    rows = torch.randperm(2 * batch, device=bench.device)[:batch]
    mel = torch.randn(batch, 1, 256, 64, device=bench.device)
    host = augment.draw(torch.ones(batch), ["a"] * batch, step_generator(0, 0, 0))
    columns = host.packed().to(bench.device)

    def all_of_it() -> tuple[Tensor, Tensor]:
        draw = host.unpacked(columns)
        return augment.wave(waveform(pcm.index_select(0, rows)), draw), augment.mel(mel, draw)

    return bench.seconds(all_of_it) / batch


def augmentation_share(bench: Bench, batch: int, rate: float) -> None:
    share = rate * augmentation_seconds(bench, batch)
    bench.row("  of it, augmentation and fetching", f"{100 * share:.1f} %", "asked: below 20 %")


def augmentation(bench: Bench) -> None:
    batch = 256 if bench.gpu else 8
    bench.row("fetching and augmentation on the device", f"{1 / augmentation_seconds(bench, batch):,.0f} clips/s")
    augment = Augment(AugmentConfig.model_validate(AUGMENT), FrontendConfig(), bench.data.bank, 1.0)
    start = time.perf_counter()
    for step in range(50):
        drawn = augment.draw(torch.ones(batch), ["a"] * batch, step_generator(0, 0, step))
        moved(drawn.packed(), bench.device)
    bench.row(
        f"drawing for a batch of {batch} on the host", f"{(time.perf_counter() - start) / 50 * 1e6:.0f} us a step"
    )


def bf16_share(bench: Bench, rate: float) -> None:
    flop = bench.results["steps"]["passt"]["flop"]
    bench.row(f"  of the bf16 ceiling ({flop / 1e9:.1f} GFLOP a clip)", f"{100 * rate * flop / bench.flops:.1f} %")


def teachers(bench: Bench) -> None:
    whole_loop(bench, "cp_resnet", 256 if bench.gpu else 8, "asked: 50,000")
    for plainly in (True, False) if bench.gpu else (False,):
        rate = whole_loop(bench, "passt", 80 if bench.gpu else 4, "asked: 35 %", plainly=plainly)
        if bench.gpu:
            bf16_share(bench, rate)


def precisions(bench: Bench) -> None:
    """Time trainings in float32, TF32 and bf16."""
    for name, batch in (("sm2", 256), ("cp_resnet", 256), ("passt", 80)) if bench.gpu else (("sm2", 8),):
        for precision in ("fp32", "tf32", "bf16"):
            whole_loop(bench, name, batch, precision=precision)


def several(bench: Bench) -> None:
    """Time students of one shape at once: stacked weights in one step (vmap), and two processes that share the GPU."""
    batch, seeds = (64, 4) if bench.gpu else (4, 2)
    own = recipe("sm2", batch, 1)
    mel = torch.randn(batch, 1, 256, 64, device=bench.device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch, device=bench.device) % SCENES

    def loss(network: Callable[[Tensor], Tensor], mel: Tensor) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
            logits = network(mel)
        return nn.functional.cross_entropy(logits.float(), target)

    def rate(parameters: Iterable[Tensor], losses: Callable[[], Tensor], clips: int) -> float:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=bench.gpu, capturable=bench.gpu)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            losses().sum().backward()
            optimizer.step()

        return clips / bench.seconds(step)

    model = build(own.model, SCENES).to(bench.device, memory_format=torch.channels_last).train()
    one = rate(model.parameters(), lambda: loss(model, mel), batch)
    models = [build(own.model, SCENES, seed).to(bench.device).train() for seed in range(seeds)]
    weights, state = stack_module_state([replace_all_batch_norm_modules_(model) for model in models])

    def of_one(weights: dict[str, Tensor], state: dict[str, Tensor], mel: Tensor) -> Tensor:
        return loss(lambda mel: functional_call(models[0], (weights, state), (mel,)), mel)

    batches = mel.expand(seeds, *mel.shape)
    more = rate(weights.values(), lambda: vmap(of_one)(weights, state, batches), seeds * batch)
    bench.row(f"networks' steps of {seeds} seeds of sm2, batch {batch}", f"stacked {more:,.0f}, one {one:,.0f} clips/s")
    with get_context("spawn").Pool(2) as pool:
        work = (str(bench.folder), bench.device.type, 64 if bench.gpu else 4)
        rates = {number: sum(pool.starmap(_share, [work] * number)) for number in (1, 2)}
    bench.row(
        "trainings of sm2, batch 64, in processes", ", ".join(f"{n}: {rate:,.0f} clips/s" for n, rate in rates.items())
    )


def _share(folder: str, device: str, batch: int) -> float:
    """Return the clips/s of a training in a process of its own."""
    own = recipe("sm2", batch, 12 if device == "cuda" else 2)
    _, history = trained(own, opened(Path(folder)), 64 * batch, float(device == "cuda"))
    return statistics.median(metrics["clips_per_second"] for metrics in history[1:])


def ensemble(bench: Bench) -> None:
    """Time twelve teachers' logits, as the stage `logits` computes them."""
    clips, batch = (4096, 256) if bench.gpu else (16, 8)
    rows, total = np.arange(clips), 0.0
    for name, count in (("cp_resnet", 6), ("passt", 6)):
        own = recipe(name, batch, 1, small=not bench.gpu)
        models = [folded(build(own.model, SCENES, seed)) for seed in range(count)]
        models = [model.to(bench.device, memory_format=torch.channels_last) for model in models]
        front_end = LogMel(own.frontend).to(bench.device)
        for bf16 in (True, False) if bench.gpu else (False,):
            predict_all(models, front_end, bench.data.store, rows[: 2 * batch], bench.device, batch, bf16)
            start = time.perf_counter()
            predict_all(models, front_end, bench.data.store, rows, bench.device, batch, bf16)
            spent = time.perf_counter() - start
            kind = "bf16" if bf16 else "fp32"
            bench.row(f"logits of six {name}, {kind}", f"{clips / spent:,.0f} clips/s")
            total += spent if bf16 or not bench.gpu else 0.0
        del models
    minutes = total / clips * sum(TAU22) / 60
    bench.row("logits of twelve teachers of TAU22 (169,300 clips), bf16", f"{minutes:.2f} minutes", "asked: 3")
    bench.row("twelve teachers about one view of a clip", f"{clips / total:,.0f} clips/s")


def loader_loop(bench: Bench) -> None:
    """Time a usual training loop of sm2: loader processes that read single clips, then front end and network."""
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as Clips

    batch, steps = (256, 24) if bench.gpu else (16, 2)
    store = bench.data.store

    class OneByOne(Clips):
        def __len__(self) -> int:
            return batch * steps

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            rng = np.random.default_rng(index)
            wave = store.pcm(np.array([index % len(store)]))[0].astype(np.float32) / 32768
            if rng.random() < 0.6:
                response = bench.data.bank.responses[rng.integers(len(bench.data.bank.names))].numpy()
                size = len(wave) + len(response) - 1
                wave = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
            wave = np.roll(wave, rng.integers(-4000, 4001)).astype(np.float32)
            return torch.from_numpy(wave), int(store.scene[index % len(store)])

    own = recipe("sm2", batch, 1)
    model = build(own.model, SCENES).to(bench.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    front_end = LogMel(own.frontend).to(bench.device)
    loader = DataLoader(OneByOne(), batch, num_workers=12 if bench.gpu else 0, pin_memory=bench.gpu)
    start = time.perf_counter()
    for number, (wave, scene) in enumerate(loader):
        if number == 4 and bench.gpu:
            start = time.perf_counter()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
            logits = model(front_end(wave[:, None].to(bench.device, non_blocking=True)))
        loss = nn.functional.cross_entropy(logits.float(), scene.to(bench.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    rate = batch * (steps - 4 if bench.gpu else steps) / (time.perf_counter() - start)
    bench.row(f"sm2 by a plain loop, {loader.num_workers} loader processes, our front end", f"{rate:,.0f} clips/s")


def int8_steps(bench: Bench) -> None:
    """Time quantization-aware training of sm2."""
    try:
        from asc_ray.int8 import preparation
    except ImportError:
        bench.row("int8 training of sm2", "torchao is not installed")
        return
    batch = 256 if bench.gpu else 16
    for precision in ("fp32", "tf32") if bench.gpu else ("fp32",):
        own = recipe("sm2", batch, 4 if bench.gpu else 2, precision=precision)
        prepared = preparation.prepare(build(own.model, SCENES), torch.zeros(2, 1, 256, 64))

        def set_mode(model: nn.Module, epoch: int | None) -> None:
            preparation.set_training(model, epoch is not None)
            if epoch == 3:
                preparation.freeze(model)

        clips = 64 * batch if bench.gpu else batch
        _, history = bench.train(own, clips, model=prepared, set_mode=set_mode)
        rates = [f"{metrics['clips_per_second']:,.0f}" for metrics in history]
        bench.row(
            f"int8 training of sm2, batch {batch}, {precision}, the last epoch frozen", ", ".join(rates) + " clips/s"
        )
        bench.row("  losses", ", ".join(f"{metrics['loss']:.4f}" for metrics in history))


PARTS = (
    ceilings, right, no_waiting, same_again, ranks, step_counts, students, front_ends, augmentation, teachers, ensemble,
    int8_steps, loader_loop, precisions, compiled, several,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], choices=[part.__name__ for part in PARTS])
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Bench(options, Path(folder)).run()


if __name__ == "__main__":
    main()
