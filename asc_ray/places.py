"""Places of a storage: where `storage` is a URI, each node has a folder for it, whose name is the URI.

So a path says on every node where in which storage it belongs, and code that reads and writes folders needs to know
nothing else. Paths that say no such thing are those of a folder, which is a storage by itself.
"""

import re
from pathlib import Path
from urllib.parse import quote, unquote

from asc_ray.files import own_folder
from asc_ray.shown import masked

PARTIAL = ".partial"  # ends the name of an unfinished artifact's folder; in an object storage it has its final name
_ENCODED = re.compile(r"[a-z][a-z0-9+.-]*%3A%2F%2F")
_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<path>[^?]*)(?P<query>\?.*)?", re.IGNORECASE)
_ARTIFACT = re.compile(r"(?P<storage>.+?)/(?P<inside>[\w-]+/[^/]+-[0-9a-f]{16}(/.*)?)")


def node_folder(uri: str, cache: Path | None = None) -> Path:
    """Return this node's folder for what lies at a URI: below `cache`, else below its temporary folder.

    A URI of something in an artifact gives the path in the folder of its storage.
    """
    found = _URI.fullmatch(uri)
    assert found is not None
    path, query = found["path"].strip("/"), found["query"] or ""
    inside = _ARTIFACT.fullmatch(path)
    storage = f"{found['scheme'].lower()}://{inside['storage'] if inside else path}{query}"
    folder = (cache or own_folder()) / quote(storage, safe="")
    return folder / inside["inside"] if inside else folder


def is_uri(text: str | Path) -> bool:
    """Whether this is a URI, and not a folder; `Path` leaves one slash of two."""
    return _URI.fullmatch(str(text)) is not None


def opened(text: str | Path) -> Path:
    """Return the path of a storage, or of something in it, that a user has named by its path or URI."""
    return node_folder(str(text)) if is_uri(text) else Path(text)


def named(path: Path) -> str:
    """Return what a user knows the path by: its URI in an object storage, or itself."""
    place = place_of(path)
    if place is None:
        return str(path)
    uri, inside = place
    found = _URI.fullmatch(uri)
    assert found is not None
    return f"{found['scheme']}://{'/'.join(filter(None, (found['path'], inside)))}{found['query'] or ''}"


def is_kept(path: Path) -> bool:
    """Whether a path is that of a node's copy of what an object storage has."""
    return place_of(path) is not None


def ready(folder: Path) -> Path:
    """Return a folder that this node is to write in; an object storage's is made, which another node has not done."""
    if is_kept(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check(uri: str) -> None:
    """Raise ValueError where no storage can be at this URI; asks no server."""
    import pyarrow.fs

    found = _URI.fullmatch(uri)
    if found is None or not found["path"].strip("/"):
        raise ValueError("names no bucket; allowed is a folder, or a URI such as s3://BUCKET/PREFIX")
    login, _, _ = found["path"].partition("/")[0].rpartition("@")
    container = found["scheme"].startswith("abfs") and ":" not in login  # abfs://CONTAINER@ACCOUNT...
    query = found["query"] or ""
    if (login and not container) or masked(query) != query:
        raise ValueError("has a login; leave it out: credentials come from the environment, and are written nowhere")
    kinds = {"s3": "S3FileSystem", "gs": "GcsFileSystem", "gcs": "GcsFileSystem", "abfs": "AzureFileSystem"}
    kinds |= {"abfss": "AzureFileSystem", "hdfs": "HadoopFileSystem", "viewfs": "HadoopFileSystem"}
    if not hasattr(pyarrow.fs, kinds.get(found["scheme"].lower(), "")):
        raise ValueError(f"{found['scheme']}:// is not known here; allowed is a folder, or a URI of {', '.join(kinds)}")


def place_of(path: Path) -> tuple[str, str] | None:
    """Return the URI of the storage that a path belongs to, and the name in it; None for a folder's."""
    text = str(path)
    if "%3A%2F%2F" not in text:
        return None
    for number, part in enumerate(path.parts):
        if _ENCODED.match(part):
            inside = [*path.parts[number + 1 :]]
            if len(inside) > 1:
                inside[1] = inside[1].removesuffix(PARTIAL)
            return unquote(part), "/".join(inside)
    return None
