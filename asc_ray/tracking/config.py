"""Where runs are tracked; it does not import mlflow, so a configuration can be read without it."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

from pydantic import Field, field_serializer, field_validator

from asc_ray.section import Section
from asc_ray.shown import masked


class TrackingConfig(Section):
    """Where runs are tracked.

    Only MLflow gets a login in `uri`: wherever a configuration is written or shown, it has *** instead.
    """

    uri: str | None = Field(None, description="any MLflow tracking URI; null: a sqlite database in the storage")
    required: bool = Field(False, description="a server that does not answer at the start is an error")
    wait_seconds: float = Field(60.0, ge=0.0, description="how long the end of a run waits for MLflow to take the rest")
    experiment: str = Field("asc-ray", min_length=1, description="name of the experiment in MLflow")

    @field_validator("uri")
    @classmethod
    def _with_its_login(cls, value: str | None) -> str | None:
        if value and "***" in value:
            raise ValueError("its login was taken out when it was written; give the whole URI, or leave it out")
        return value

    @field_serializer("uri")
    def _without_login(self, value: str | None) -> str | None:
        return value and masked(value)


DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"  # in a storage, where no server is configured


def default_uri(storage: Path) -> str:
    """Return the URI of the storage's own store."""
    database = str(storage / DATABASE)
    quoted = quote(database, safe="/ ")
    # For plain sqlite:/// MLflow makes the folders of the path as it is written, quotes included.
    return f"{'sqlite' if quoted == database else 'sqlite+pysqlite'}:///{quoted}"


def database_of(uri: str) -> Path | None:
    """Return the file of a sqlite URI; None for other URIs."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+).*", uri)
    return Path(unquote(found[1])) if found else None
