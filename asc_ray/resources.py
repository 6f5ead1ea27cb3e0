"""What the pipeline asks of a cluster; this imports no ray, so that a configuration can be read without it."""

import os
from typing import Self

from pydantic import Field, model_validator

from asc_ray.section import Section

RAYS_FOLDER = ".ray"  # the folder of a storage where Ray Train and Tune write what nobody reads; no run leaves it


class Resources(Section):
    """What one training worker or inference task asks of the cluster; fractions of a GPU are allowed."""

    cpus: float = Field(1, gt=0.0, description="CPUs of each, and as many threads")
    gpus: float = Field(0, ge=0.0, description="GPUs of each; 0 computes on the CPU")

    def options(self) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def per_worker(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


class TrainerResources(Resources):
    """What one training asks: `workers` processes, each with these CPUs and GPUs, that take every step together."""

    workers: int = Field(1, ge=1, description="processes that share a training")

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.workers > 1 and self.gpus % 1:
            raise ValueError(f"{self.workers} workers with {self.gpus:g} GPUs each; allowed: whole GPUs, or 1 worker")
        return self


class ClusterConfig(Section):
    """The Ray cluster that does the work."""

    address: str | None = Field(
        None, description="a Ray cluster to join; null: that of RAY_ADDRESS; without that, an embedded one"
    )
    connect_seconds: float = Field(
        60, ge=1.0, description="how long Ray may take to start or to answer before the command gives up, s"
    )
    retries: int = Field(3, ge=0, description="how often a training is resumed after its worker died")

    @property
    def joined(self) -> str:
        """Return the address of the cluster to join; `local` for an embedded one."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"
