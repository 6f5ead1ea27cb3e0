"""The MLflow store of a storage that was copied or moved: it knows absolute paths."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asc_ray.tracking.config import ARTIFACTS, DATABASE

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

    Otherwise a copy would write its artifacts into the original. Raises sqlite3.Error where the store is damaged.
    """
    if not (storage / DATABASE).is_file():
        return
    now = storage.as_uri()
    with closing(sqlite3.connect(storage / DATABASE)) as store, store:
        try:
            found = store.execute(
                "SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?", (f"%/{ARTIFACTS}",)
            )
        except sqlite3.OperationalError:  # MLflow has not made its tables yet
            return
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
            store.execute("UPDATE tags SET value = ? WHERE key = 'asc_ray.storage' AND value = ?", (str(storage), old))
