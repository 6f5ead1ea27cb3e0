"""One object storage: opened by its URI, and its errors in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from asc_ray.disk import GOES_ON, DiskError
from asc_ray.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# What a user does about each error, by a word of the store's own message.
_REMEDIES = {
    "there is no such bucket; make it, or correct `storage`": (
        "NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist",
    ),
    "access is denied; give this process and every node credentials that may list, read, write and delete there": (
        "ACCESS_DENIED", "AccessDenied", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN",
        "InvalidAccessKeyId", "INVALID_CLIENT_TOKEN_ID", "PERMISSION_DENIED", "UNAUTHENTICATED", "HTTP status 403",
        "HTTP status 401", "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "no credentials",
    ),
    "it cannot be reached; see whether it runs, and whether AWS_ENDPOINT_URL and the network are right": (
        "NETWORK_CONNECTION", "UNAVAILABLE", "Could not resolve", "Could not connect", "timed out", "TIMEOUT",
        "SERVICE_UNAVAILABLE", "SLOW_DOWN", "INTERNAL_FAILURE",
    ),
}  # fmt: skip


@lru_cache(maxsize=8)
def open_storage(uri: str) -> tuple["FileSystem", str]:
    """Return the file system of a storage, and the storage's path in it, which begins with the bucket."""
    import pyarrow as pa
    import pyarrow.fs

    # One request for a small file in place of three.
    fast = "&allow_delayed_open=true" if "?" in uri else "?allow_delayed_open=true"
    with told(uri):
        try:
            files, base = pyarrow.fs.FileSystem.from_uri(uri + (fast if uri.startswith("s3://") else ""))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"storage: {uri}: {error}") from None
        bucket = base.partition("/")[0]  # others than S3 ask for rights of its own to look at a bucket
        if uri.startswith("s3://") and files.get_file_info(bucket).type == pyarrow.fs.FileType.NotFound:
            raise OSError("NO_SUCH_BUCKET")
    return files, base.rstrip("/")


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Raise DiskError, in one line with what to do, for an error of the store."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is not None:  # of this node's disk
            raise
        text = str(error)
        known = next((line for line, words in _REMEDIES.items() if any(word in text for word in words)), None)
        kind = re.search(r"AWS Error [A-Z_]+ during \w+", text)
        reason = known or f"{text.splitlines()[0][:300]}; mend it"
        detail = f" ({kind[0]})" if kind else ""
        raise DiskError(f"storage {uri}: {reason}{detail}, {GOES_ON}") from None
