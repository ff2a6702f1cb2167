"""Datasets behind s3://, gs://, https:// or hf://, through fsspec.

    CACHE/<hash of the address>/dataset.json ...         small files, fetched at the start
    CACHE/<hash of the address>/chunks/<shard>.<byte>    chunks, a bounded cache on the local disk (see cache.py)

A request that fails is repeated with growing waits, since stores refuse, stall and drop connections; each has a time
limit, since a read that hangs stops every rank.  What does not exist or is not allowed is not asked for again.
"""

import hashlib
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline.data.cache import FileCache
from pipeline.data.errors import DataError
from pipeline.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, load_manifest
from pipeline.data.shards import INDEX_SUFFIX, atomic_write
from pipeline.data.stores import Extent

T = TypeVar("T")

_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_THREADS = 8
_PIECE_BYTES = 2**24


@dataclass(frozen=True)
class RemoteOptions:
    """How remote stores are read; see the keys of the section `data`."""

    cache: Path = Path("~/.cache/qsparse/data")
    cache_bytes: int = 50 * 10**9
    retries: int = 5
    timeout_seconds: float = 60.0


def is_remote(path: str) -> bool:
    """Whether this is an address rather than a folder."""
    return "://" in path


class RemoteFolder:
    """The files of one address.

    Args:
        address: such as `s3://bucket/dataset`.
        options: retries and time limits.

    Raises:
        DataError: the scheme is unknown or needs a package that is not installed.
    """

    def __init__(self, address: str, options: RemoteOptions) -> None:
        self.address, self._options = address.rstrip("/"), options
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{address}: {error}; s3:// needs s3fs, gs:// gcsfs, https:// aiohttp, hf:// huggingface_hub"
            ) from None

    def fetch(self, name: str, begin: int | None = None, size: int | None = None) -> bytes:
        """A file, or `size` bytes of it from `begin` on.

        Raises:
            OSError: all attempts failed; the message names address, attempts and the last failure.
        """
        end = None if begin is None or size is None else begin + size
        return self._with_retries(name, lambda: self._fetch_once(name, begin, end))

    def download(self, name: str, path: Path) -> None:
        """Copy a file piece by piece, each with its own attempts; `path` appears when it is complete.

        Raises:
            OSError: as for `fetch`.
        """
        size = self._with_retries(name, lambda: int(self._call(self._files.info, name)["size"]))
        with atomic_write(path) as file:
            for begin in range(0, size, _PIECE_BYTES):
                file.write(self.fetch(name, begin, min(_PIECE_BYTES, size - begin)))

    def names(self) -> list[str]:
        """Names of all files; none if the store does not list folders, as most web servers."""
        try:
            found = self._files.ls(self._root, detail=False)
        except Exception:  # clients raise what they like
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def _fetch_once(self, name: str, begin: int | None, end: int | None) -> bytes:
        # Clients that open files for this would read megabytes ahead.
        unbuffered = {} if isinstance(self._files, AsyncFileSystem) else {"cache_type": "none"}
        data: bytes = self._call(self._files.cat_file, name, start=begin, end=end, **unbuffered)
        if begin is not None and end is not None and len(data) != end - begin:
            raise OSError(f"the store sent {len(data)} bytes for bytes {begin} to {end}")
        return data

    def _call(self, method: Callable[..., Any], name: str, **arguments: Any) -> Any:
        if isinstance(self._files, AsyncFileSystem):  # the others have limits of their own
            arguments["timeout"] = self._options.timeout_seconds
        return method(f"{self._root}/{name}", **arguments)

    def _with_retries(self, name: str, request: Callable[[], T]) -> T:
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(self._options.retries + 1):
            try:
                return request()
            except (FileNotFoundError, PermissionError) as error:
                raise type(error)(f"{self.address}/{name}: {type(error).__name__}: {error}") from None
            except Exception as error:  # clients raise what they like: their own errors, asyncio's, ssl's
                problem = f"{type(error).__name__}: {error}".removesuffix(": ")
            if attempt < self._options.retries:
                time.sleep(wait * random.uniform(0.5, 1.0))  # not all ranks at once
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
        attempts = self._options.retries + 1
        raise OSError(f"{self.address}/{name}: {attempts} attempts failed, the last with {problem}")


class RemoteStore:
    """Chunks of remote shards, kept on the local disk.

    Args:
        remote: the dataset's address.
        folder: its place in the cache.
        limit_bytes: size of the cache.
    """

    attempts = 3

    def __init__(self, remote: RemoteFolder, folder: Path, limit_bytes: int) -> None:
        self._remote = remote
        self.advice = f"see what else is wrong with `qsparse data verify {remote.address}`"
        self._cache = FileCache(folder / "chunks", limit_bytes)

    def read(self, extent: Extent, start: int, size: int) -> bytes:
        """`size` bytes of a chunk from its byte `start` on."""
        name = _cache_name(extent)
        data = self._cache.read(name, start, size)
        if data is None or len(data) != size:
            whole = self._remote.fetch(extent.shard, extent.begin, extent.size)
            self._cache.write(name, whole)
            data = whole[start : start + size]
        return data

    def discard(self, extent: Extent) -> None:
        """Fetch the chunk anew when it is asked for next."""
        self._cache.remove(_cache_name(extent))

    def describe(self, shard: str) -> str:
        """Address of a shard."""
        return f"{self._remote.address}/{shard}"

    def close(self) -> None:
        """Nothing is open."""


def _cache_name(extent: Extent) -> str:
    return f"{extent.shard}.{extent.begin}"


def fetch_metadata(remote: RemoteFolder, cache: Path) -> Path:
    """Copy what describes a dataset to the cache: dataset.json, tokenizer and the indexes of its shards.

    Returns:
        Folder that holds them.

    Raises:
        DataError: one cannot be fetched.
    """
    folder = cache.expanduser() / hashlib.sha256(remote.address.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _copy(remote, folder, [MANIFEST_NAME])
        manifest = load_manifest(folder)
        records = [record for shards in manifest.splits.values() for record in shards]
        versions = folder / "versions"  # files of another version of the dataset must not be taken for this one's
        is_same = versions.is_file() and versions.read_text() == manifest.identity()
        names = [TOKENIZER_NAME, *(f"{record.name}{INDEX_SUFFIX}" for record in records)]
        _copy(remote, folder, [name for name in names if not is_same or not (folder / name).is_file()])
        if not is_same:
            with atomic_write(versions) as file:
                file.write(manifest.identity().encode())
    except OSError as error:
        raise DataError(f"remote dataset cannot be opened: {error}") from None
    return folder


def _copy(remote: RemoteFolder, folder: Path, names: Iterable[str]) -> None:
    def copy(name: str) -> None:
        data = remote.fetch(name)
        with atomic_write(folder / name) as file:
            file.write(data)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, names))
