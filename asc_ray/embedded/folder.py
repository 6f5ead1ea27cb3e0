"""The folder `c` of a bundle: written, and compared with onnxruntime."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from asc_ray.embedded.figures import CForm
from asc_ray.embedded.generate import Source, generate
from asc_ray.embedded.program import COMPILER, EMULATOR, HOST_TOOLS, answers, emulated, missing
from asc_ray.embedded.readme import README, render_readme
from asc_ray.errors import UserError
from asc_ray.files import built, read_plain
from asc_ray.runtime import C_FORM, MODEL, Bundle
from asc_ray.runtime.agreement import differing

_MOST_TEXT = 1 << 26
_NOISE_CLIPS = 20


def write_c(folder: Path, out: Path, pcm: Iterable[np.ndarray], logits: np.ndarray) -> CForm:
    """Write the C form of the bundle in `folder` to the new folder `out`, compared on clips.

    pcm: batches of the clips, (n, samples) int16; logits: onnxruntime's (N, labels) for all of them.
    Raises UserError where `generate` does, before anything is written; where there is no C compiler; and as `differing`
    does.
    """
    source = generate(folder)
    if gone := missing(*HOST_TOOLS):
        raise UserError(
            f"{folder}: --target c compares the C form with onnxruntime, and this machine has no "
            f"{' and no '.join(gone)}; install what is missing (Debian: build-essential)"
        )
    first: list[np.ndarray] = []  # a clip to measure

    def batches() -> Iterator[np.ndarray]:
        for batch in pcm:
            if not first:
                first.append(batch[:1])
            yield batch

    form = _compared(folder, source, answers(source.files, batches(), logits.shape[1]), logits)
    figures = None if missing(COMPILER, EMULATOR) else emulated(source.files, first[0], logits.shape[1])[1]
    form = replace(form, figures=figures)
    try:
        with built(out) as building:
            for name, text in (source.files | {README: render_readme(Bundle(folder), form)}).items():
                (building / name).write_text(text)
            building.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    return form


def verify_c(folder: Path) -> CForm | None:
    """Check that the C form in a bundle is what the bundle gives, and compare it with onnxruntime on noise.

    Code is compiled that was generated here; the folder's is only compared with it. Return None where there is no C
    compiler. Raises UserError naming what is wrong.
    """
    source, own = generate(folder), folder / C_FORM
    for name, text in source.files.items():
        try:
            found = read_plain(own / name, _MOST_TEXT, follow=False)
        except OSError as error:
            raise UserError(f"{own / name}: {error.strerror}; delete {own} and export with --target c again") from None
        if found != text.encode():
            raise UserError(
                f"{own / name}: not what this version of asc-ray makes of {MODEL}; delete {own} and export with "
                "--target c again"
            )
    if missing(*HOST_TOOLS):
        return None
    pcm, logits = noise(Bundle(folder))
    return _compared(folder, source, answers(source.files, iter([pcm]), logits.shape[1]), logits)


def noise(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Return clips of noise from silence to full scale, (N, samples) int16, and onnxruntime's logits for them."""
    loud = np.geomspace(1, 12_000, _NOISE_CLIPS)[:, None]
    pcm = np.random.default_rng(0).standard_normal((_NOISE_CLIPS, bundle.frontend.samples)) * loud
    pcm = np.clip(np.round(pcm), -32768, 32767).astype(np.int16)
    return pcm, bundle.logits(pcm)


def _compared(folder: Path, source: Source, own: np.ndarray, logits: np.ndarray) -> CForm:
    differ = differing(own, logits, f"{folder}: the C form and onnxruntime", "Report this with the bundle")
    return CForm(
        samples=source.samples,
        bytes=sum(len(text.encode()) for text in source.files.values()),
        weights=source.weights,
        arena=source.arena,
        clips=len(logits),
        differ=differ,
        equal=int((own == logits).all(axis=1).sum()),
        largest_difference=float(abs(own - logits).max()),
        figures=None,
    )
