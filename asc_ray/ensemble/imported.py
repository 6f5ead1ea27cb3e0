"""Systems whose logits come from a file: made elsewhere, by networks that this program need not know."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
from torch import Tensor

from asc_ray.artifacts import Artifact
from asc_ray.data.clips import SPLITS, ClipStore
from asc_ray.data.logits import write_logits
from asc_ray.data.pieces import piece_file
from asc_ray.ensemble.config import ImportedConfig
from asc_ray.errors import UserError
from asc_ray.files import open_plain
from asc_ray.models.pretrained import read_stored
from asc_ray.shown import printable
from asc_ray.training.dataset import Source

ID_NAMES = ("clip_id", "filename")
LOGITS = "logits"
SHOWN = 3


class Foreign(NamedTuple):
    """What a file holds: `values` (N, K) float32, and the clips' names and the scenes where it has them."""

    ids: list[str] | None
    labels: tuple[str, ...] | None
    values: np.ndarray


def import_logits(artifact: Artifact, name: str, config: ImportedConfig, source: Source) -> None:
    """Make a system's logit store from a file. Raises UserError where that does not fit the clips."""
    folder, store = artifact.open_partial(), source.store()
    logits, unused = aligned(config, store)
    metadata = {"system": name, "config": artifact.key, "labels": json.dumps(store.labels), "corpus": store.corpus}
    agrees = {}
    for split in SPLITS:
        rows = np.flatnonzero(store.split == split)
        write_logits(piece_file(folder, split, 0), store.ids[rows], logits[rows], metadata | {"split": split})
        agrees[split] = float((logits[rows].argmax(axis=1) == store.scene[rows]).mean())
    facts = {"imported": config.logits.name, "clips": len(store), "unused": unused, "agrees": agrees}
    artifact.finish(facts)


def aligned(config: ImportedConfig, store: ClipStore) -> tuple[np.ndarray, int]:
    """Return the file's logits of the store's clips (N, K) float32, in its order of clips and of scenes.

    The second value is the number of clips in the file that the store lacks. A clip is found by its name in meta.csv,
    or where no name is the same by the file's name without folders and ending. Raises UserError for a file that cannot
    be read, lacks clips, has one twice, has other scenes, or holds what are no logits.
    """
    file = config.logits
    found = _read(file)
    ids = _agreed(file, "ids", found.ids, _names(config.ids) if config.ids else None)
    if ids is None:
        raise UserError(f"{file}: does not name its clips; give `ids`, a table with a column `filename` in its order")
    if len(ids) != len(found.values):
        raise UserError(f"{file}: logits of {len(found.values)} clips, and {len(ids)} names in {config.ids or file}")
    values = found.values[
        :, _columns(file, _agreed(file, "labels", found.labels, config.labels), store.labels, found.values.shape[1])
    ]
    rows = _rows(file, ids, store)
    _refuse_no_logits(file, values[rows], store)
    return values[rows], len(ids) - len(rows)


def _agreed(file: Path, key: str, own: Sequence[str] | None, given: Sequence[str] | None) -> Sequence[str] | None:
    """Return the names that the file has or the configuration gives. Raises UserError where it has others."""
    if own is not None and given is not None and list(own) != list(given):
        raise UserError(f"{file}: has names of its own, and `{key}` has others or another order; leave `{key}` out")
    return given if own is None else own


def _columns(file: Path, labels: Sequence[str] | None, wanted: Sequence[str], count: int) -> list[int]:
    """Return each wanted scene's column. Raises UserError for other scenes, or where their order is not known."""
    if labels is None:
        raise UserError(
            f"{file}: does not name its {count} columns; give `labels`, the scenes in their order; the corpus has "
            f"{', '.join(wanted)}"
        )
    if len(labels) != count:
        raise UserError(f"{file}: {count} columns, and {len(labels)} labels: {', '.join(labels)}")
    if sorted(labels) != sorted(wanted):
        raise UserError(f"{file}: is of the scenes {', '.join(labels)}; the corpus has {', '.join(wanted)}")
    return [list(labels).index(label) for label in wanted]


def _rows(file: Path, ids: Sequence[str], store: ClipStore) -> np.ndarray:
    """Return the file's row of each of the store's clips. Raises UserError for clips that it lacks or has twice."""
    keys, wanted = list(ids), list(store.ids)
    if not set(keys) & set(wanted):
        keys, wanted = [_stem(name) for name in keys], [_stem(name) for name in wanted]
    needed, times = set(wanted), Counter(keys)
    if twice := [name for name in needed if times[name] > 1]:
        raise UserError(f"{file}: {len(twice)} clips occur more than once: {_some(sorted(twice))}")
    row_of = {key: row for row, key in enumerate(keys)}
    if missing := [name for name, key in zip(list(store.ids), wanted, strict=True) if key not in row_of]:
        splits = Counter(store.split[store.index_of(missing)].tolist())
        of = " and ".join(f"{count} of the {split} split" for split, count in sorted(splits.items()))
        raise UserError(
            f"{file}: lacks {len(missing)} of {len(wanted)} clips ({of}): {_some(missing)}; it names {_some(ids)}"
        )
    return np.array([row_of[key] for key in wanted])


def _refuse_no_logits(file: Path, values: np.ndarray, store: ClipStore) -> None:
    """Raise UserError for values that are not finite, or that are probabilities."""
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        raise UserError(f"{file}: {broken.sum()} clips have values that are not finite: {_some(store.ids[broken])}")
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
        raise UserError(f"{file}: holds probabilities, which add up to 1; save their logarithms, or the logits")


def _stem(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).stem


def _some(names: Sequence[str] | np.ndarray) -> str:
    shown = ", ".join(printable(str(name))[:80] for name in names[:SHOWN])
    return shown + (", ..." if len(names) > SHOWN else "")


def _read(file: Path) -> Foreign:
    """Read a file of logits by its ending. Raises UserError."""
    found = _parsed(file, _READERS)
    if found.values.ndim != 2:
        raise UserError(f"{file}: logits of shape {found.values.shape}; expected (clips, scenes)")
    return found


def _names(file: Path) -> list[str]:
    """Read the clips' names from a table. Raises UserError."""
    table = _parsed(file, _TABLES)
    ids = _ids_of(table)
    if ids is None:
        raise UserError(f"{file}: columns {', '.join(table.column_names)}; expected one of {', '.join(ID_NAMES)}")
    return ids


def _parsed(file: Path, readers: Mapping[str, Callable[[Path], Any]]) -> Any:
    """Return what the reader of the file's ending makes of it. Raises UserError."""
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: unknown kind of file; allowed are {', '.join(readers)}")
    try:
        return reader(file)
    except UserError:
        raise
    except Exception as error:  # a cut or forged file may raise anything
        reason = printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise UserError(f"{file}: cannot be read ({reason[:200]})") from None


def _ids_of(table: pa.Table) -> list[str] | None:
    return next((table[name].cast(pa.string()).to_pylist() for name in ID_NAMES if name in table.column_names), None)


def _from_table(file: Path) -> Foreign:
    """Read a table: the clips' names, and a column of lists `logits` or a column for each scene."""
    table = _TABLES[file.suffix.lower()](file)
    ids, metadata = _ids_of(table), table.schema.metadata or {}
    if LOGITS in table.column_names:
        values = np.array(table[LOGITS].to_pylist(), dtype=np.float32)
        return Foreign(ids, tuple(json.loads(metadata[b"labels"])) if b"labels" in metadata else None, values)
    numeric = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    if not numeric:
        raise UserError(f"{file}: columns {', '.join(table.column_names)}; expected one of numbers for each scene")
    return Foreign(
        ids, tuple(numeric), np.column_stack([table[name].to_numpy() for name in numeric]).astype(np.float32)
    )


def _from_npz(file: Path) -> Foreign:
    with open_plain(file) as opened, np.load(opened, allow_pickle=False) as arrays:
        wanted = [name for name in arrays.files if name in (*ID_NAMES, LOGITS, "labels")]
        try:
            return _from_parts(file, {name: arrays[name] for name in wanted})
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise UserError(
                f"{file}: holds Python's objects, and reading these could run code; save names as text, by "
                "names.astype(str)"
            ) from None


def _from_torch(file: Path) -> Foreign:
    stored = read_stored(file)
    return _from_parts(file, {LOGITS: stored} if isinstance(stored, Tensor) else dict(stored))


def _from_parts(file: Path, parts: dict[str, Any]) -> Foreign:
    if LOGITS not in parts:
        raise UserError(f"{file}: holds {_some(list(map(str, parts))) or 'nothing'}; expected `{LOGITS}`")
    ids = next((list(map(str, parts[name])) for name in ID_NAMES if name in parts), None)
    labels = tuple(map(str, parts["labels"])) if "labels" in parts else None
    return Foreign(ids, labels, np.asarray(parts[LOGITS], dtype=np.float32))


def _csv(file: Path) -> pa.Table:
    """Read a table whose first line is divided by tabs, or else by commas."""
    with open_plain(file) as opened:
        delimiter = "\t" if b"\t" in opened.readline() else ","
        opened.seek(0)
        return pyarrow.csv.read_csv(opened, parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter))


def _arrow(file: Path) -> pa.Table:
    with open_plain(file) as opened:
        return pyarrow.feather.read_table(opened)


def _parquet(file: Path) -> pa.Table:
    with open_plain(file) as opened:
        return pyarrow.parquet.read_table(opened)


_TABLES: dict[str, Callable[[Path], pa.Table]] = {
    ".arrow": _arrow, ".feather": _arrow, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv,
}  # fmt: skip
_READERS: dict[str, Callable[[Path], Foreign]] = {
    **dict.fromkeys(_TABLES, _from_table), ".npz": _from_npz, ".pt": _from_torch, ".pth": _from_torch,
}  # fmt: skip
