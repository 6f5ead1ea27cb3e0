"""The C form as a program: compiled for this computer, or for a Cortex-M4 that QEMU emulates."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from asc_ray.embedded.figures import Figures
from asc_ray.errors import UserError
from asc_ray.shown import printable

HOST_TOOLS = ("make", "cc")
COMPILER, EMULATOR = "arm-none-eabi-gcc", "qemu-system-arm"
CROSS = COMPILER.removesuffix("gcc")
_SAMPLES = "samples.raw"
_BATCH = 256  # clips a run of the program
_LONGEST = 1800  # seconds of a compilation, or of a run


def missing(*tools: str) -> list[str]:
    """Return the tools that this machine does not have."""
    return [tool for tool in tools if shutil.which(tool) is None]


def answers(files: Mapping[str, str], pcm: Iterator[np.ndarray], labels: int) -> np.ndarray:
    """Compile the C form for this computer, and return its logits (N, labels) for batches of int16 clips (n, samples).

    Raises UserError where it does not compile or does not run.
    """
    with _unpacked(files) as folder:
        _run(folder, "make", "-s")
        logits = []
        for batch in pcm:
            for start in range(0, len(batch), _BATCH):
                _write(folder, batch[start : start + _BATCH])
                logits.append(_logits(_run(folder, "./asc", _SAMPLES), labels))
    return np.concatenate(logits)


def emulated(files: Mapping[str, str], pcm: np.ndarray, labels: int) -> tuple[np.ndarray, Figures]:
    """Run the C form on an emulated Cortex-M4F, and return its logits (N, labels) and what it takes.

    Raises UserError where it does not compile or does not run.
    """
    with _unpacked(files) as folder:
        sizes = _run(folder, "make", "-s", f"CROSS={CROSS}").splitlines()[-1].split()
        text, data, bss = map(int, sizes[:3])
        _write(folder, pcm)
        lines = _run(folder, "make", "-s", f"CROSS={CROSS}", "run").splitlines()
    costs = [[int(word) for word in line.split()[:3]] for line in lines]
    front_end, network, stack = map(max, zip(*costs, strict=True))
    logits = _logits("\n".join(line.split(maxsplit=3)[3] for line in lines), labels)
    return logits, Figures(text + data, data + bss, stack, front_end, network)


@contextmanager
def _unpacked(files: Mapping[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for file, text in files.items():
            (Path(name) / file).write_text(text)
        yield Path(name)


def _write(folder: Path, pcm: np.ndarray) -> None:
    (folder / _SAMPLES).write_bytes(np.ascontiguousarray(pcm, np.int16).tobytes())


def _run(folder: Path, *command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=_LONGEST, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the C form: `{' '.join(command)}` takes more than {_LONGEST} seconds") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"the C form: `{' '.join(command)}` fails ({printable(said[-1])}); report this with the bundle")
    return done.stdout


def _logits(output: str, labels: int) -> np.ndarray:
    """Read lines of a scene's number and each logit's bits."""
    rows = [re.findall(r"\b[0-9a-f]{8}\b", line)[:labels] for line in output.splitlines()]
    bits = np.array([[int(word, 16) for word in row] for row in rows], np.uint32)
    return bits.view(np.float32).reshape(len(rows), labels)
