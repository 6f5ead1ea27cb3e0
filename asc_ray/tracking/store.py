"""The sqlite files in which MLflow stores what it is told where there is no server."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

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


def prepare(storage: Path) -> None:
    """Check the storage's own store, and let it name the storage and its runs' files where they lie now.

    The store of a copied or moved storage knows absolute paths, and would write into the original. Raises sqlite3.Error
    for a store that is damaged, locked or read-only, which MLflow would try again for minutes.
    """
    database = storage / DATABASE
    if not database.is_file():
        return
    with closing(sqlite3.connect(database, isolation_level=None)) as store:
        store.execute("BEGIN IMMEDIATE")  # fails where nothing can be written
        if store.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("database disk image is malformed")
        if store.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            _follow(store, storage)
        store.execute("COMMIT")


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


# On these a lock of one machine may not be seen by another, and sqlite loses what two write at once.
_ON_A_NETWORK = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "pvfs", "orangefs")


def on_a_network(path: Path, mounts: str) -> str:
    """Return the type of the file system on which the path lies if it is one of a network, else nothing.

    `mounts` is the text of /proc/mounts.
    """
    kind, longest = "", -1
    for line in mounts.splitlines():
        point, found = line.split(" ")[1:3]
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)
        if len(point) >= longest and path.is_relative_to(point):  # a later one lies over an earlier one
            kind, longest = found, len(point)
    return kind if kind.removeprefix("fuse.").startswith((*_ON_A_NETWORK, "sshfs")) else ""
