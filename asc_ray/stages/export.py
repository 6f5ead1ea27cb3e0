"""`asc-ray export`: write a finished int8 student as one folder, checked and with a card, and register it in MLflow."""

import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from asc_ray.artifacts import (
    Artifact,
    content_key,
    input_folder,
    read_manifest,
    stored_file,
    stored_files,
    write_atomically,
)
from asc_ray.config.yaml_text import read_yaml
from asc_ray.data.clips import SPLITS, ClipStore, open_clips
from asc_ray.embedded.figures import CForm
from asc_ray.embedded.folder import noise, write_c
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import read_evaluation, score
from asc_ray.evaluation.scores import guessed
from asc_ray.files import built
from asc_ray.int8.bundle import CARD, compare, operator_counts, seal, write_bundle
from asc_ray.int8.train import load_int8
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.places import is_kept, is_uri, named, opened
from asc_ray.plan import BEST_STUDENT
from asc_ray.progress import Progress
from asc_ray.remote import children
from asc_ray.report.card import Card, render_card
from asc_ray.runtime import C_FORM, CHECKSUMS, MODEL, Bundle
from asc_ray.shown import masked
from asc_ray.students.config import StudentConfig
from asc_ray.students.tflite import TFLITE, TFLiteForm, check_tflite, write_tflite
from asc_ray.tracking.config import database_of, default_uri
from asc_ray.tracking.lookup import artifacts_of, runs_of
from asc_ray.tracking.registry import check_name, register
from asc_ray.tracking.store import prepare
from asc_ray.tracking.things import first_line
from asc_ray.training.weights import load_model

_BATCH = 256  # clips


@dataclass(frozen=True)
class Origin:
    """The folders of an int8 student, of its float32 student, and of their clip store."""

    int8: Path
    student: Path
    clips: Path

    @property
    def storage(self) -> Path:
        return self.int8.parents[1]

    @property
    def key(self) -> str:
        return str(read_manifest(self.int8)["key"])


def student_config(folder: Path) -> StudentConfig:
    """Return a finished student's configuration: that of its manifest, or the search's best with the student's seed."""
    manifest = read_manifest(folder)
    section = manifest["config"]["student"]
    if key := manifest["inputs"].get("sweep"):
        found = stored_file(input_folder(folder.parents[1], "sweep", key), BEST_STUDENT)
        best = read_yaml(found.read_text(), str(found))["student"]
        section = {**best, "seed": section["seed"]}
    return StudentConfig.model_validate(section)


def find(run: str, uri: str | None, default_storage: Path) -> tuple[Origin, str]:
    """Return the int8 student that `run` names, and the URI of the tracking server that knows it.

    `run` is the folder of a finished int8 training, or a file in it; or the ID of an MLflow run, either of an int8
    training or of a pipeline. If a pipeline has several int8 students, the best on the validation part is taken.
    Raises UserError if `run` is none of these.
    """
    path = opened(run) if is_uri(run) else Path(run).resolve()
    if is_uri(run) or path.exists():
        folder = path if is_uri(run) or path.is_dir() else path.parent
        found = [folder]
        read_manifest(folder)  # raises if the folder is not an artifact
        uri = uri or default_uri(folder.parents[1])
    else:
        uri = uri or default_uri(default_storage)
        made = artifacts_of(uri, run)
        # The storage may have been moved since, or copied.
        storages = [default_storage, *dict.fromkeys(storage for storage, _ in made)]
        ends = tuple(f"-{key}" for _, key in made)
        everywhere = (
            [folder / name for name in children(folder) if name.endswith(ends)]
            for folder in (storage / "int8" for storage in storages)
        )
        found = next(filter(None, everywhere), [])
        if not found:
            raise UserError(
                f"{run}: no folder, and not the run of a finished int8 training in {masked(uri)}. Give the folder that "
                "`asc-ray status` shows, or a run's ID with --config or --set tracking.uri=..."
            )
    for folder in found:
        manifest = read_manifest(folder)
        if (stage := manifest["stage"]) != "int8":
            raise UserError(
                f"{named(folder)}: of the stage {stage}, and not an int8 student; run `asc-ray qat` and give what it "
                "made"
            )
        if "validation" not in manifest["facts"]:
            raise UserError(f"{named(folder)}: made by an earlier version; run `asc-ray qat` again")
    best = max(found, key=lambda folder: read_manifest(folder)["facts"]["validation"]["validation_macro_accuracy"])
    stored_files(best)
    storage = best.parents[1]
    student = input_folder(storage, "students", read_manifest(best)["inputs"]["student"])
    clips = input_folder(storage, "clips", read_manifest(student)["inputs"]["clips"])
    return Origin(best, student, clips), uri


def export_c(bundle: Path, out: Path, progress: Progress) -> None:
    """Write the C form of an exported bundle, of which no clips are at hand, to the new folder `out`.

    Raises UserError for a bundle that is not as it was exported, where `write_c` does, and if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder, or delete it")
    pcm, logits = noise(Bundle(bundle))
    form = write_c(bundle, out, [pcm], logits)
    progress.note(f"{form.clips} clips of noise: {form.differ} get another scene than onnxruntime's")


def _prepare(storage: Path, uri: str) -> None:
    try:
        prepare(storage)
    except sqlite3.Error as error:
        raise UserError(f"{database_of(uri)}: cannot be used as MLflow's store ({first_line(error, uri)})") from None


def export_bundle(
    run: str,
    out: Path,
    name: str,
    license: str,
    uri: str | None,
    default_storage: Path,
    progress: Progress,
    in_c: bool = False,
    in_tflite: bool = False,
) -> None:
    """Write the bundle of `run` to `out`, and register it in MLflow as `name`. An equal bundle in `out` stays.

    `license`: that of the model, for its card; empty where it has none yet. `in_c`, `in_tflite`: with the folder of C,
    with the float32 student for TensorFlow Lite. An equal bundle in `out` without that gets it, and its figures in the
    card.

    Raises UserError where `find`, `compare`, `write_c`, `write_tflite` and `register` do, and if `out` holds something
    else.
    """
    check_name(name)
    if in_tflite:
        check_tflite()
    out = out.absolute()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CHECKSUMS).is_file())):
        raise _taken(out)
    origin, uri = find(run, uri, default_storage)
    if uri == default_uri(origin.storage):
        _prepare(origin.storage, uri)
    store, config = open_clips(origin.clips, whole=not is_kept(origin.clips)), student_config(origin.student)
    with built(out) as building:
        write_bundle(building, origin.int8, store.labels, config.frontend)
        test = np.flatnonzero(store.split == "test")
        int8 = load_int8(origin.int8, config, len(store.labels))
        logits, agreement = compare(building, int8, store, test)
        runs = runs_of(uri, {"int8": origin.key, "student": str(read_manifest(origin.student)["key"])})
        form = None
        if in_c:
            batches = (store.pcm(test[start : start + _BATCH]) for start in range(0, len(test), _BATCH))
            form = write_c(building, building / C_FORM, batches, logits)
        lite = None
        if in_tflite:
            network = load_model(origin.student, config, len(store.labels))
            shape = read_manifest(origin.student)["facts"]["input"]
            lite = write_tflite(network, config.frontend, shape, store, test, building / TFLITE)
        counts = operator_counts(int8)
        size = (building / MODEL).stat().st_size
        card = _card(origin, config, store, test, logits, agreement, runs, counts, size, license, form, lite)
        write_atomically(building / CARD, render_card(card))
        seal(building)
        _put(building, out)
    _tell(progress, card)
    if "int8" in runs:
        partition = read_manifest(origin.student)["config"]["partition"]
        judged_on = content_key(clips=origin.clips.name, partition=partition)
        clips = read_manifest(origin.int8)["facts"].get("validation_clips")
        guessing = guessed(len(store.labels), clips) if clips else 0.0
        progress.note(register(uri, runs["int8"], out, name, card.validation, judged_on, guessing))
    else:
        progress.note(f"not registered: no run in {masked(uri)} has trained this model")


def _taken(out: Path) -> UserError:
    return UserError(f"{out}: exists, and is not this bundle; choose another folder, or delete it")


def _put(building: Path, out: Path) -> None:
    """Rename the folder `building` to `out`. An equal bundle stays; one that only lacks a form makes room."""
    if (out / CHECKSUMS).is_file() and _sums(out) == _sums(building):
        shutil.rmtree(building)
        return
    if (out / CHECKSUMS).is_file():
        if not _forms(out) < _forms(building) or not set(_sums(out, CARD)) <= set(_sums(building, CARD)):
            raise _taken(out)
        shutil.rmtree(out)
    elif out.exists():
        out.rmdir()
    building.rename(out)


def _forms(bundle: Path) -> set[str]:
    return {name for name in (C_FORM, TFLITE) if (bundle / name).exists()}


def _tell(progress: Progress, card: Card) -> None:
    """Say how good the bundle is, and how its forms agree."""
    progress.note(f"{card.scores.clips} test clips: {100 * card.scores.accuracy:.1f} % right in onnxruntime")
    progress.note(
        f"torch names {card.agreement['differ']:.0f} of them differently; the largest difference of a logit is "
        f"{card.agreement['largest_difference']:.4f}"
    )
    if form := card.c_form:
        progress.note(
            f"the C form names {form.differ} of them differently from onnxruntime; {form.equal} have equal logits, to "
            "the bit"
        )
    if lite := card.tflite_form:
        progress.note(
            f"TensorFlow Lite names {lite.differ} of them differently from the float32 student in torch; the largest "
            f"difference of a logit is {lite.largest_difference:.1e}"
        )


def _sums(bundle: Path, but: str = "") -> list[str]:
    """Return the lines of the bundle's checksums, without that of the file `but`."""
    lines = (bundle / CHECKSUMS).read_text().splitlines()
    return [line for line in lines if not but or not line.endswith(f"  {but}")]


def _card(
    origin: Origin,
    config: StudentConfig,
    store: ClipStore,
    test: np.ndarray,
    logits: np.ndarray,
    agreement: Mapping[str, float],
    runs: Mapping[str, str],
    operators: Sequence[tuple[str, str, int]],
    file_bytes: int,
    license: str,
    form: CForm | None,
    lite: TFLiteForm | None,
) -> Card:
    int8, student, clips = (read_manifest(folder) for folder in (origin.int8, origin.student, origin.clips))
    model = config.model
    size = model.size if isinstance(model, DSFlexiNetConfig) else None
    scored = content_key(stage="evaluation", config={}, inputs={"model": student["key"]})
    evaluation = Artifact(origin.storage, "evaluation", "students", scored, {}, {})
    made_from = {**clips["inputs"], **student["inputs"], "student": student["key"], "int8": int8["key"]}
    lineage: dict[str, Any] = {**made_from, **{f"MLflow run of the {what}": id for what, id in runs.items()}}
    lineage |= {package: version(package) for package in ("torch", "torchao", "onnxruntime")}
    by_split = {split: store.split == split for split in SPLITS}
    return Card(
        title=f"{model.name} {size}" if size else model.name,
        version=version("asc-ray"),
        network=f"{model.name} {size or ''}".strip(),
        labels=store.labels,
        sample_rate=config.frontend.sample_rate,
        input=student["facts"]["input"],
        parameters=student["facts"]["parameters"],
        macs=student["facts"]["macs"],
        bytes=int8["facts"]["bytes"],
        peak_activations=int8["facts"].get("peak_activations"),
        file_bytes=file_bytes,
        scores=score(store, test, logits),
        float_scores=read_evaluation(evaluation.path) if evaluation.complete else None,
        unseen=store.unseen_devices,
        validation=int8["facts"]["validation"]["validation_macro_accuracy"],
        agreement=agreement,
        corpus=clips["facts"]["corpus"],
        corpus_notes=clips["facts"]["corpus_notes"],
        splits={split: (int(rows.sum()), len(store.place.among(rows))) for split, rows in by_split.items()},
        fingerprint=store.corpus,
        recipe=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        license=license,
        lineage=lineage,
        operators=operators,
        c_form=form,
        tflite_form=lite,
    )
