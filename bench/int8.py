"""Time naming a scene on one core: the bundle end to end, and int8 against float32 in onnxruntime and torch.

    python bench/int8.py [--models sm1 sm2 sm3 sm4 cp_mobile] [--repeats 500] [--batch 64]

Networks have random weights, because times do not depend on them. All forms of a network take turns in one process.
Printed are milliseconds for one second of sound (median and 99th percentile), and clips a second in batches.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from asc_ray.artifacts import Artifact
from asc_ray.config.composition import checked, network_preset
from asc_ray.int8 import conversion, preparation
from asc_ray.int8.bundle import write_bundle
from asc_ray.int8.onnx_form import export_onnx
from asc_ray.models.registry import build, folded
from asc_ray.runtime import Bundle
from asc_ray.training.config import Recipe

LABELS = [f"scene {number}" for number in range(10)]


def session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def forms(
    name: str, folder: Path, batch: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Return the calls to time for one clip, and those for a batch."""
    recipe = checked(Recipe, network_preset(name), name)
    torch.manual_seed(0)
    network = build(recipe.model, len(LABELS)).train()
    shape = (1, recipe.frontend.mels, recipe.frontend.frames(32_000))
    example = torch.randn(8, *shape)
    network(example)
    fake = preparation.prepare(network, example[:2])
    with preparation.observing(fake):
        fake(example)
    int8 = conversion.convert(fake)
    artifact = Artifact(folder, "int8", name, "0" * 16, {}, {})
    export_onnx(int8, artifact.open_partial() / "model.onnx")
    artifact.finish({})
    plain = folded(network.eval())
    free = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(plain, (example[:2],), dynamic_shapes=free).module()
    export_onnx(graph, folder / "float.onnx")
    bundle_folder = folder / "bundle"
    bundle_folder.mkdir()
    write_bundle(bundle_folder, artifact.path, LABELS, recipe.frontend)
    bundle = Bundle(bundle_folder)
    waves = 0.1 * np.random.default_rng(0).standard_normal((batch, 32_000), dtype=np.float32)
    mels = bundle._log_mel(waves)
    integer, real = session(artifact.path / "model.onnx"), session(folder / "float.onnx")

    def timed(count: int) -> dict[str, Callable[[], object]]:
        own = mels[:count]
        tensor = torch.from_numpy(own).contiguous(memory_format=torch.channels_last)
        return {
            "wave to scene, int8": lambda: bundle.probabilities(waves[:count]).argmax(1),
            "front end": lambda: bundle._log_mel(waves[:count]),
            "onnxruntime, int8": lambda: integer.run(None, {"mel": own}),
            "onnxruntime, float32": lambda: real.run(None, {"mel": own}),
            "torch, float32": lambda: plain(tensor),
            "torch, int8 emulated": lambda: int8(torch.from_numpy(own)),
        }

    return timed(1), timed(batch)


def milliseconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: np.array(own) for name, own in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["sm1", "sm2", "sm3", "sm4", "cp_mobile"])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            one, many = forms(name, Path(folder), args.batch)
            single, batches = milliseconds(one, args.repeats), milliseconds(many, max(3, args.repeats // 50))
            size = (Path(folder) / "bundle" / "model.onnx").stat().st_size
        print(f"{name}: model.onnx {size / 1000:.0f} kB")
        for form, own in single.items():
            rate = 1000 * args.batch / np.median(batches[form])
            print(f"  {form:<22} {np.median(own):7.2f} ms  p99 {np.quantile(own, 0.99):7.2f} ms  {rate:8.0f} clips/s")
        ratio = np.median(single["onnxruntime, int8"]) / np.median(single["onnxruntime, float32"])
        print(f"  int8 takes {ratio:.2f} times float32's time in onnxruntime", flush=True)


if __name__ == "__main__":
    main()
