"""What a configuration makes: every artifact of every stage, its key, and what it is made from.

With `student.seeds` there are several students and int8 forms, named by their seeds. A student's key does not
depend on how many there are, so a configuration with one seed and one with three share a student.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asc_ray import remote
from asc_ray.artifacts import Artifact, content_key, file_sha256, read_record, stored_file
from asc_ray.audio.responses import bank_identity
from asc_ray.config.asked import check_corpus
from asc_ray.config.configuration import Config
from asc_ray.config.yaml_text import read_yaml
from asc_ray.data.demo import SCENES
from asc_ray.data.reading import Reading, keep, kept_reading, new_reading
from asc_ray.ensemble.config import FUSION_FORM, imported_identity, published
from asc_ray.errors import ConfigError
from asc_ray.evaluation.artifact import EVALUATION_FORM, read_evaluation
from asc_ray.evaluation.seeds import OverSeeds, over_seeds
from asc_ray.int8.config import INT8_FORM
from asc_ray.students.config import StudentConfig
from asc_ray.students.targets import TargetFiles
from asc_ray.training.config import Recipe
from asc_ray.training.folder import start_in_key

BEST_STUDENT = "best.yaml"
TRIALS_TABLE = "trials.csv"
FAILED = "failed.json"  # says why a system kept failing, in its folder
REPORT = "report.html"

# What each stage needs before it can run, by stage name.
NEEDS: dict[str, tuple[str, ...]] = {
    "corpus": (),
    "ingest": ("corpus",),
    "teachers": ("ingest",),
    "logits": ("teachers",),
    "fuse": ("logits",),
    "sweep": ("fuse",),
    "student": ("fuse", "sweep"),
    "specialize": ("student",),
    "qat": ("student",),
    "evaluate": ("fuse", "specialize", "qat"),
    "report": ("evaluate",),
}
STAGES = tuple(NEEDS)


class Plan:
    """Every artifact of a configuration, found without building anything.

    `source` is what was read of the corpus: by this plan; for a plan with the same section `corpus`, if given; or by an
    earlier command, which counts where the corpus is unchanged and whole in the clip store, and unless it is to be read
    `anew`. It is None for the demo's corpus.

    Raises ConfigError, and CorpusError if the corpus cannot be used.
    """

    def __init__(self, config: Config, source: Reading | None = None, anew: bool = False) -> None:
        self.config = config
        corpus = config.corpus
        self.source = source
        self.demo: Artifact | None = None
        responses = corpus.impulse_responses
        if responses is not None and not responses.is_dir():
            raise ConfigError(
                f"corpus.impulse_responses: {responses} is no folder; name a folder of *.wav files, or null"
            )
        if corpus.path is None:
            corpus.refuse_without_path()
            self.demo = self._artifact("corpus", "demo", corpus.demo, {})
        elif not anew and self.source is None:
            self.source = kept_reading(config.folder, corpus)
        ingest = {"on_bad_clip": corpus.on_bad_clip, "impulse_responses": self._impulse_responses_identity()}
        if self.demo or self.source:
            self.clips = self._clips(ingest)
        if not self.demo and not (self.source and (self.source.corpus or self._ingested_whole())):
            self.source = new_reading(corpus)
            self.clips = self._clips(ingest)
        if self.source:
            check_corpus(config, self.source)
        base = {"clips": self.clips.key}
        recipes = config.teachers.recipes
        self.imported = published(config.teachers.checkpoints, recipes) if config.teachers.checkpoints else {}
        crossfit = config.fusion.data == "crossfit"
        if crossfit and (made := [*self.imported, *config.teachers.imported]):
            raise ConfigError(
                f"fusion.data: crossfit trains every system {config.fusion.folds} times, but {', '.join(made)} come "
                "from files; choose holdout, or train them"
            )
        folds = range(config.fusion.folds) if crossfit else [None]
        # Every training of a system, by name: one, or one for each fold.
        trainings = {
            name: {_of_fold(name, fold): self._teacher(name, recipe, fold, base) for fold in folds}
            for name, recipe in recipes.items()
        }
        self.left_out = self._left_out(trainings)
        self.trainings = {name: own for name, own in trainings.items() if name not in self.left_out}
        self.teachers = {name: teacher for own in self.trainings.values() for name, teacher in own.items()}
        self.logits = {
            name: self._artifact(
                "logits",
                name,
                {"precision": config.logits.precision},
                base | {"teacher" if len(own) == 1 else part: teacher.key for part, teacher in own.items()},
            )
            for name, own in self.trainings.items()
        }
        self.logits |= {
            name: self._artifact("logits", name, {"imported": imported_identity(name, own)}, base)
            for name, own in config.teachers.imported.items()
        }
        fused = {name: logits.key for name, logits in self.logits.items()}
        learned = config.fusion.for_key()
        del learned["tasks"], learned["folds"]  # `_division` has the folds
        fusion = {"fusion": learned, "partition": self._division(), "form": FUSION_FORM}
        self.fusion = self._artifact("fusion", "fusion", fusion, {**base, **fused})
        self._add_students(base)
        self.evaluation = self._artifact("evaluation", "ensemble", {}, {**fused, "fusion": self.fusion.key})
        evaluated = {name: artifact.key for name, artifact in self.evaluations.items()}
        self.report = self._artifact("report", config.name, {}, {"ensemble": self.evaluation.key, **evaluated})
        searched = config.sweep and {"sweep": config.sweep.for_key(), "limits": config.limits.for_key()}
        sections = {"precision": config.logits.precision, "sweep": searched}
        sections |= {name: getattr(config, name).for_key() for name in ("partition", "student", "qat")} | fusion
        # This key does not depend on which systems are left out.
        inputs = {name: teacher.key for own in trainings.values() for name, teacher in own.items()}
        inputs |= {name: fused[name] for name in config.teachers.imported}
        self.key = content_key(stage="pipeline", config=sections, inputs=inputs)

    def _add_students(self, base: Mapping[str, str]) -> None:
        """Add the search, the students, their int8 forms, and the scores of both."""
        config = self.config
        learned = {**base, "soft_target": self.fusion.key if config.taught else "none"}
        seeds = range(config.student.seed, config.student.seed + config.student.seeds)
        student = {"student": start_in_key("student", config.student), "partition": self._division()}
        del student["student"]["seeds"]
        student["student"].pop("specialize", None)
        if file := config.student.checkpoint:
            if config.sweep:
                raise ConfigError("student.checkpoint: there is nothing to search for with it; give sweep: null, too")
            if not file.is_file():
                raise ConfigError(f"student.checkpoint: {file}: no such file")
            student["student"]["checkpoint"] = file_sha256(file)
        self.sweep: Artifact | None = None
        if config.sweep:
            search = {**student, "sweep": config.sweep.for_key(), "limits": config.limits.for_key()}
            self.sweep = self._artifact("sweep", "sweep", search, learned)
            learned = {**learned, "sweep": self.sweep.key}
        self.seeds = {_of_seed("student", seed, len(seeds)): seed for seed in seeds}
        self.students = {
            name: self._artifact(
                "students", "student", student | {"student": student["student"] | {"seed": seed}}, learned
            )
            for name, seed in self.seeds.items()
        }
        specialize = config.student.specialize and {"specialize": config.student.specialize.for_key()}
        self.specialized = {
            name.replace("student", "specialized"): self._artifact(
                "specialized", "student", specialize, {"student": artifact.key}
            )
            for name, artifact in (self.students.items() if specialize else ())
        }
        self.int8 = {
            _int8(name): self._artifact(
                "int8", "student", {"qat": config.qat.for_key(), "form": INT8_FORM}, {"student": artifact.key}
            )
            for name, artifact in self.students.items()
        }
        self.evaluations = {
            name: self._artifact("evaluation", artifact.stage, {"form": EVALUATION_FORM}, {"model": artifact.key})
            for name, artifact in self.models.items()
        }

    def by_stage(self) -> dict[str, list[Artifact]]:
        return {
            "corpus": [self.demo] if self.demo else [],
            "ingest": [self.clips],
            "teachers": list(self.teachers.values()),
            "logits": list(self.logits.values()),
            "fuse": [self.fusion],
            "sweep": [self.sweep] if self.sweep else [],
            "student": list(self.students.values()),
            "specialize": list(self.specialized.values()),
            "qat": list(self.int8.values()),
            "evaluate": [self.evaluation, *self.evaluations.values()],
            "report": [self.report],
        }

    @property
    def forms(self) -> dict[str, dict[str, Artifact]]:
        """The students and what is made of them, by kind and name."""
        return {"student": self.students, "specialized": self.specialized, "int8": self.int8}

    @property
    def models(self) -> dict[str, Artifact]:
        return {name: artifact for own in self.forms.values() for name, artifact in own.items()}

    def trial(self, number: int) -> Artifact:
        """Return a trial as an artifact for MLflow's runs; its result is a file of the sweep's artifact."""
        assert self.sweep is not None
        return Artifact(self.config.folder, "sweep", "trial", f"{self.sweep.key}-{number}", {}, {})

    def complete_keys(self) -> set[str]:
        """Return the keys of all finished artifacts."""
        return {artifact.key for artifacts in self.by_stage().values() for artifact in artifacts if artifact.complete}

    def corpus_root(self) -> Path:
        return self.demo.path if self.demo else self.config.corpus.path  # type: ignore[return-value]

    def impulse_responses(self) -> Path | None:
        """Return the configured folder, else the corpus' own `dirs`, else None for the built-in bank."""
        if self.config.corpus.impulse_responses:
            return self.config.corpus.impulse_responses
        own = self.corpus_root() / "dirs"
        return own if own.is_dir() else None

    def target_files(self, target: str) -> TargetFiles | None:
        """Return the files of the soft targets with this name; None for labels alone."""
        if target == "none":
            return None
        if target in self.logits:
            return TargetFiles(self.logits[target].path, "train-*")
        return TargetFiles(self.fusion.path, f"targets/{target}/*")

    def student_configs(self) -> dict[str, StudentConfig]:
        """Return the students' configurations: the sweep's best if there is a sweep."""
        config = self.config.student
        if self.sweep is not None:
            found = stored_file(self.sweep.path, BEST_STUDENT)
            best = read_yaml(found.read_text(), str(found))
            config = StudentConfig.model_validate(best["student"]).model_copy(update={"specialize": config.specialize})
        return {name: config.model_copy(update={"seed": seed}) for name, seed in self.seeds.items()}

    def scores(self, names: Iterable[str]) -> OverSeeds:
        """Return the test scores, over the seeds, of finished students, or forms of them, with these names."""
        return over_seeds([read_evaluation(self.evaluations[name].path) for name in names])

    def needs(self, stage: str) -> tuple[str, ...]:
        """Return the stages that must be done before `stage`; a student without soft targets needs no teachers."""
        if stage in ("sweep", "student") and not self.config.taught:
            return tuple("ingest" if need == "fuse" else need for need in NEEDS[stage])
        return NEEDS[stage]

    @property
    def scenes(self) -> int:
        """How many scenes the corpus has."""
        return len(self.source.labels if self.source else SCENES)

    def keep_reading(self) -> None:
        """Keep what was read of the corpus for the next command; the caller holds the storage's lock."""
        if self.source and self.source.corpus:
            keep(self.config.folder, self.config.corpus, self.source if self._ingested_whole() else None)

    def _ingested_whole(self) -> bool:
        """Whether the clip store is there and no clip was left out, which somebody may mend."""
        return self.clips.complete and not self.clips.facts()["skipped"]

    def _clips(self, ingest: Mapping[str, Any]) -> Artifact:
        if self.demo:
            return self._artifact("clips", "demo", ingest, {"corpus": self.demo.key})
        assert self.source is not None
        assert self.config.corpus.path is not None
        return self._artifact("clips", self.config.corpus.path.name, ingest, {"corpus": self.source.fingerprint})

    def _artifact(self, stage: str, name: str, config: Any, inputs: Mapping[str, str]) -> Artifact:
        section = config if isinstance(config, dict) else config.for_key()
        key = content_key(stage=stage, config=section, inputs=dict(inputs))
        return Artifact(self.config.folder, stage, name, key, section, dict(inputs))

    def _division(self) -> dict[str, Any]:
        """Return how the training clips are divided, in the form that goes into keys."""
        fusion, parts = self.config.fusion, self.config.partition.for_key()
        if fusion.data == "holdout":
            return parts
        del parts["fusion"]
        return parts | ({"folds": fusion.folds} if fusion.data == "crossfit" else {})

    def _teacher(self, name: str, recipe: Recipe, fold: int | None, inputs: Mapping[str, str]) -> Artifact:
        section: dict[str, Any] = {"partition": self._division()}
        if fold is not None:
            section["fold"] = fold
        if name in self.imported:  # only these parts of the recipe change an imported system's logits
            own = {"model": recipe.model.for_key(), "frontend": recipe.frontend.for_key()}
            section = {"recipe": own, "imported": file_sha256(self.imported[name])}
        else:
            section["recipe"] = start_in_key(f"teachers.recipes.{name}", recipe)
        return self._artifact("teachers", _of_fold(name, fold), section, inputs)

    def _left_out(self, systems: Mapping[str, Mapping[str, Artifact]]) -> dict[str, str]:
        """Return the errors of the systems left out; empty if more failed than `teachers.allow_missing`."""
        failed = {
            name: error
            for name, own in systems.items()
            for artifact in own.values()
            if not artifact.complete and (error := failure(artifact)) is not None
        }
        if len(failed) > self.config.teachers.allow_missing:
            return {}
        if wanted := failed.keys() & set(self.config.soft_target_names):
            raise ConfigError(
                f"student.distillation.soft_target: {min(wanted)} failed and is left out; choose another, or train it "
                "again with --set teachers.allow_missing=0"
            )
        return failed

    def _impulse_responses_identity(self) -> Any:
        if self.demo and not self.config.corpus.impulse_responses:
            return "the demo corpus' own"
        return bank_identity(self.impulse_responses())

    def missing(self, stage: str) -> list[Artifact]:
        """Return the stage's artifacts that are not complete."""
        return [artifact for artifact in self.by_stage()[stage] if not artifact.complete]


def scores_over_seeds(plan: Plan) -> dict[str, OverSeeds]:
    """Return the scores of the students and of their forms on the test split."""
    words = {"student": "student fp32"}
    return {words.get(kind, f"student {kind}"): plan.scores(own) for kind, own in plan.forms.items() if own}


def _of_seed(name: str, seed: int, seeds: int) -> str:
    return name if seeds == 1 else f"{name}-seed{seed}"


def _of_fold(name: str, fold: int | None) -> str:
    return name if fold is None else f"{name}-fold{fold}"


def _int8(student: str) -> str:
    return student.replace("student", "int8")


def failure(artifact: Artifact) -> str | None:
    """Return why this system's training was given up, or None."""
    note = read_record(remote.refreshed(artifact.partial / FAILED))
    return note["error"] if note else None


def dump(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json")
