"""Bytes under keys, in a folder or in S3: read, replace atomically, create conditionally, list.

A key is a relative path with forward slashes. Whoever reads sees a whole object or none; of many who `create` one key
exactly one wins. Names that start with a dot are temporary files: never keys, never listed. Credentials come from the
usual AWS chain and never appear in a message.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage.base import FullDiskError, MissingError, Storage, checked_key, room_for
from pipeline.storage.digests import canonical_json, parse_json, sha256_file, sha256_hex
from pipeline.storage.folder import Folder
from pipeline.storage.s3 import Bucket, checked_endpoint, make_bucket

__all__ = [
    "Bucket",
    "Folder",
    "FullDiskError",
    "MissingError",
    "Storage",
    "canonical_json",
    "checked_endpoint",
    "checked_key",
    "make_bucket",
    "open_file",
    "open_storage",
    "parse_json",
    "room_for",
    "sha256_file",
    "sha256_hex",
]


def open_storage(url: str) -> Storage:
    """Open a folder (a plain path or file://...) or an S3 prefix (s3://bucket/prefix)."""
    scheme, separator, rest = url.partition("://")
    if not url.strip():
        raise UsageError("an empty storage address", cure="give a folder or s3://bucket/prefix")
    if not separator:
        return Folder(str(Path(url).expanduser().absolute()))
    if scheme == "file" and rest.startswith("/"):
        return Folder(str(Path(urllib.parse.unquote(rest))))
    bucket = rest.partition("/")[0]
    if scheme == "s3" and bucket and "?" not in rest and not any(mark in bucket for mark in "@:"):
        return Bucket("s3://" + "/".join(part for part in rest.split("/") if part))
    shown = f"{scheme}://..." if any(mark in rest for mark in "@?:") else url
    raise UsageError("not a storage address", where=shown, cure="give a folder, file:///folder or s3://bucket/prefix")


def open_file(url: str) -> tuple[Storage, str]:
    """(the storage a file lies in, its key there) of a path or an address; UsageError for what names no file."""
    folder, slash, key = url.rpartition("/")
    storage = open_storage(folder + slash if slash else ".")
    if not key or key.startswith("."):
        raise UsageError("not a file", where=url, cure="name one")
    return storage, key
