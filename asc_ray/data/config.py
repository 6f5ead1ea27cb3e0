"""The sections of a corpus, of its division into parts, and of how its clips reach what computes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from asc_ray.errors import ConfigError
from asc_ray.section import Section

FusionData = Literal["holdout", "crossfit", "train"]
_COLUMN = re.compile(r"\{([^{}]+)\}")


class DemoConfig(Section):
    """Size of the synthetic corpus; a test second makes nine clips, one per device."""

    renamed: ClassVar[Mapping[str, str]] = {
        "train_places_per_scene": "train_locations_per_scene",
        "test_places_per_scene": "test_locations_per_scene",
    }
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")
    train_clips_per_scene: int = Field(80, ge=4, le=10_000, description="training clips of each scene")
    train_places_per_scene: int = Field(16, ge=2, le=1_000, description="places of a scene's training clips")
    test_seconds_per_scene: int = Field(10, ge=1, le=1_000, description="test seconds of each scene")
    test_places_per_scene: int = Field(5, ge=1, le=1_000, description="places of a scene's test seconds")
    impulse_responses: int = Field(16, ge=1, le=256, description="responses in the folder `dirs`")


class TableConfig(Section):
    """The table of a corpus, and the columns that say what its recordings are."""

    file: Path = Field(description="CSV, TSV or Parquet with a row a recording; relative to the corpus' folder")
    path: str = Field(
        description="column with the recordings' files, relative to the corpus' folder; or a text with columns in "
        "braces, as in audio/fold{fold}/{slice_file_name}"
    )
    scene: str = Field(description="column with the scenes")
    device: str | None = Field(None, description="column with the devices; null: all recordings are of one device")
    place: str | None = Field(
        None, description="column with what recordings of one place share; null: each file is a place of its own"
    )
    split: str | None = Field(None, description="column with the splits; null: a test split is made by place")

    @property
    def path_columns(self) -> list[str]:
        return _COLUMN.findall(self.path) or [self.path]

    def path_of(self, row: dict[str, str]) -> str:
        """Return the file's name of a row."""
        if not _COLUMN.search(self.path):
            return row[self.path]
        return _COLUMN.sub(lambda found: row[found[1]], self.path)

    @property
    def columns(self) -> dict[str, str]:
        """All columns that are needed, each with the key that names it."""
        keys = dict.fromkeys(self.path_columns, "corpus.table.path")
        own = {key: getattr(self, key) for key in ("scene", "device", "place", "split")}
        return keys | {column: f"corpus.table.{key}" for key, column in own.items() if column is not None}

    @field_validator("path", "scene", "device", "place", "split")
    @classmethod
    def _names_a_column(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("an empty text; give a column's name")
        return value


class CorpusConfig(Section):
    """The corpus, and how it is read. `path: null` stands for the synthetic demo corpus that `demo` describes."""

    path: Path | None = Field(None, description="folder of a corpus")
    layout: Literal["tau", "table", "folders"] = Field(
        "tau", description="how the corpus lies there: as TAU22, as one table with the recordings, or a folder a scene"
    )
    table: TableConfig | None = Field(None, description="the table and its columns, for `layout: table`")
    test: tuple[str, ...] | None = Field(
        None,
        description="what stands for the test split: values of the column `split`, as in [5], or with `layout: "
        "folders` the folders above those of the scenes; null: the value `test`, and with folders a split by place",
    )
    test_share: float = Field(
        0.25, gt=0.0, lt=1.0, description="share of each scene's recordings in a test split that is made by place"
    )
    test_seed: int = Field(0, ge=0, description="seed of a test split that is made by place")
    place_pattern: str | None = Field(
        None,
        description="regular expression whose first group is the place in a file's name, where nothing else says the "
        "place; null: each file is a place of its own",
    )
    segment_seconds: float | None = Field(
        None, description="1.0 cuts recordings into whole seconds; null: each is a clip of about one second"
    )
    train_split: Path | None = Field(
        None, description="a list of training clips instead of fold1_train.csv, such as DCASE24's split5.csv"
    )
    on_bad_clip: Literal["refuse", "skip"] = Field(
        "refuse", description="whether a clip that cannot be used stops the ingest, or is left out and recorded"
    )
    shard_clips: int = Field(4096, ge=1, le=4096, description="clips of one Arrow file")
    impulse_responses: Path | None = Field(
        None, description="folder of wavs for DIR; null: `dirs` in the corpus, else a built-in bank"
    )
    demo: DemoConfig = Field(default_factory=DemoConfig)

    def refuse_without_path(self) -> None:
        """Raise ConfigError for keys that say how to read a corpus, where there is none but the demo's."""
        if self.train_split:
            raise ConfigError("corpus.train_split: chooses among the clips of corpus.path, which is not given")
        for key in ("layout", "segment_seconds"):
            if getattr(self, key) not in ("tau", None):
                raise ConfigError(f"corpus.{key}: says how to read corpus.path, which is not given")

    @field_validator("test", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Take numbers, as of folds, for the texts that a table has."""
        plain = isinstance(value, list | tuple) and all(isinstance(own, str | int) for own in value)
        return [str(own) for own in value] if plain else value

    @field_validator("test")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value == ():
            raise ValueError("an empty list; name what stands for the test split, or give null")
        return value

    @field_validator("segment_seconds")
    @classmethod
    def _one_second(cls, value: float | None) -> float | None:
        if value not in (None, 1.0):
            raise ValueError(
                f"{value}; allowed is 1.0, or null: networks and front ends take clips of one second (docs/corpus.md)"
            )
        return value

    @field_validator("place_pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error})") from None
            if groups < 1:
                raise ValueError(f"{value!r} has no group; put the place in parentheses, as in user([0-9]+)")
        return value

    @model_validator(mode="after")
    def _of_the_layout(self) -> Self:
        if (self.table is not None) != (self.layout == "table"):
            given = "is missing" if self.table is None else f"is given, but layout is {self.layout}"
            raise ValueError(f"table: {given}; `layout: table` and `table` go together")
        if self.layout != "tau" and self.train_split is not None:
            raise ValueError(f"train_split: is a list of TAU's layout; layout is {self.layout}")
        if self.layout == "tau" and self.test is not None:
            raise ValueError("test: with `layout: tau` evaluation_setup/ has the splits; leave test out")
        if self.table and self.test and not self.table.split:
            raise ValueError("test: names values of a column; give table.split, too")
        if self.place_pattern and (self.layout == "tau" or (self.table and self.table.place)):
            raise ValueError("place_pattern: the metadata say the places; leave it out, or table.place")
        return self


class PartitionConfig(Section):
    """Shares of the training clips, by place, that no teacher is trained on; the rest is the part `train`.

    With `fusion.data: holdout` eq. 4 is learned on the part `fusion`. Nothing is trained on the part `validation`:
    trials and epochs are chosen by it.
    """

    fusion: float = Field(0.12, gt=0.0, lt=0.5, description="share of the part `fusion`")
    validation: float = Field(0.12, gt=0.0, lt=0.5, description="share of the part `validation`")
    seed: int = Field(0, ge=0, description="seed of the division")

    def shares(self, fusion_data: FusionData, folds: int) -> dict[str, float]:
        """Return the shares that `partition` takes out of the part `train`."""
        validation = {"validation": self.validation}
        if fusion_data == "holdout":
            return {"fusion": self.fusion} | validation
        if fusion_data == "crossfit":
            return {f"fold-{n}": (1 - self.validation) / folds for n in range(folds)} | validation
        return validation


class DataConfig(Section):
    """How clips reach the GPU or CPU that computes. It changes no result, so it is in no key.

    `mapped` reads the memory-mapped store, `resident` keeps all clips in the memory of the GPU or CPU, `stream` has
    other nodes read ahead through Ray Data; `auto` is resident on a GPU where the clips fit, else mapped.
    """

    mode: Literal["auto", "mapped", "resident", "stream"] = Field("auto", description="where clips are read from")
    resident_share: float = Field(
        0.5, gt=0.0, le=1.0, description="share of the free memory, or of a GPU's part, that resident clips may take"
    )
    cache: Path | None = Field(
        None,
        description="a folder on every node's own disk, where one copy of the clip store is kept and mapped; of an "
        "object storage all that a node builds and reads, for which null is below its temporary folder",
    )
