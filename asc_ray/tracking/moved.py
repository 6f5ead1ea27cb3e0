"""The MLflow store of a storage that was copied or moved: it knows absolute paths."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asc_ray.errors import UserError
from asc_ray.tracking.config import ARTIFACTS, DATABASE
from asc_ray.tracking.things import STORAGE_TAG

# Where MLflow's tables hold the places of files.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow(storage: Path) -> None:
    """Let the storage's own store name the files of its runs where they lie now, and the storage itself.

    Otherwise a copy would write its artifacts into the original. Raises UserError where the store cannot be read.
    """
    database = storage / DATABASE
    if not database.is_file():
        return
    try:
        with closing(sqlite3.connect(database)) as store, store:
            if store.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
                _follow(store, storage)
    except sqlite3.Error as error:
        raise UserError(
            f"{database}: cannot be read as MLflow's store ({error}); where nothing else uses it now, move it away: "
            "the next run begins another"
        ) from None


def _follow(store: sqlite3.Connection, storage: Path) -> None:
    now = storage.as_uri()
    found = store.execute(
        "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?", (f"%/{ARTIFACTS}",)
    )
    for (location,) in found.fetchall():
        before = location.removesuffix(f"/{ARTIFACTS}")
        if before == now:
            continue
        for table, column in _PLACES:
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (now, len(before) + 1, len(before) + 1, f"{before}/"),
            )
        old = unquote(urlsplit(before).path)
        store.execute("UPDATE tags SET value = ? WHERE key = ? AND value = ?", (str(storage), STORAGE_TAG, old))
