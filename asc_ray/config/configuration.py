"""The whole configuration: one frozen section that holds every other one."""

import os
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from asc_ray.config.explain import explain
from asc_ray.data.config import CorpusConfig, DataConfig, PartitionConfig
from asc_ray.ensemble.config import FusionConfig, LogitsConfig, TeachersConfig
from asc_ray.int8.config import QATConfig
from asc_ray.places import check, is_uri, node_folder
from asc_ray.resources import ClusterConfig, Resources
from asc_ray.search.config import NOT_JUDGED, SweepConfig
from asc_ray.section import Section, absolute
from asc_ray.students.config import Limits, StudentConfig, changed
from asc_ray.tracking.config import TrackingConfig

SOFT_TARGET = "distillation.soft_target"


class Config(Section):
    name: str = Field("asc", pattern=r"^[A-Za-z0-9._-]+$", description="name of the report and of the run in MLflow")
    storage: Path | str = Field(
        description="where all artifacts are: a folder that every node of a cluster reaches, or the URI of an object "
        "storage, s3://BUCKET/PREFIX"
    )
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    teachers: TeachersConfig
    logits: LogitsConfig = LogitsConfig()
    fusion: FusionConfig = FusionConfig()
    sweep: SweepConfig | None = None
    student: StudentConfig
    limits: Limits = Limits()
    student_resources: Resources = Resources()
    qat: QATConfig = QATConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: Path | str) -> Path | str:
        if is_uri(value):
            check(str(value))
            return str(value).rstrip("/")
        value = Path(value)
        if not value.is_absolute() and str(value)[:1] != "~" and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            raise ValueError("in a Ray job it must be absolute: the working directory is a temporary copy")
        return absolute(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if isinstance(self.storage, str) and self.tracking.uri is None:
            raise ValueError(
                "tracking.uri: must be given where storage is a URI, because MLflow's own database needs a folder; "
                "allowed is the URI of a server, as in tracking.uri=http://HOST:5000"
            )
        if self.data.mode == "stream" and self.data.cache and not isinstance(self.storage, str):
            raise ValueError(
                "data.cache: a stream copies no clip store of a folder; leave cache null, or choose another data.mode"
            )
        if self.sweep:
            check_space(self.sweep, self.student)
        allowed = ("none", "average", "fused", *self.teachers.systems)
        for soft in self.soft_target_names:
            if soft not in allowed:
                raise ValueError(f"student.{SOFT_TARGET}: {soft!r} is unknown; allowed: {', '.join(allowed)}")
        return self

    @property
    def folder(self) -> Path:
        """Return the folder in which artifacts are read and written: the storage, or this node's for its URI."""
        return node_folder(self.storage, self.data.cache) if isinstance(self.storage, str) else self.storage

    @property
    def soft_target_names(self) -> tuple[str, ...]:
        """Return the student's soft target and those that the search may choose."""
        found = {self.student.distillation.soft_target: None}
        for key, parameter in self.sweep.space.items() if self.sweep else ():
            if key in (SOFT_TARGET, "distillation"):
                found |= {changed(self.student, {key: end}).distillation.soft_target: None for end in parameter.ends()}
        return tuple(found)

    @property
    def taught(self) -> bool:
        """Whether any student or trial may learn from soft targets."""
        return set(self.soft_target_names) != {"none"}


def check_space(sweep: SweepConfig, student: StudentConfig) -> None:
    """Raise ValueError if a key of the space is unknown, or an end of its range is not allowed."""
    for key, parameter in sweep.space.items():
        if reason := NOT_JUDGED.get(key) or NOT_JUDGED.get(key.partition(".")[0]):
            raise ValueError(f"sweep.space.{key}: is not searched, because {reason}; give it in student.{key}")
        for value in parameter.ends():
            try:
                changed(student, {key: value})
            except ValidationError as error:
                raise ValueError(f"sweep.space.{key}: {value!r}: student.{explain(error, StudentConfig)}") from None
            except KeyError as error:
                raise ValueError(f"sweep.space.{key}: student has no key {error.args[0]!r}") from None
