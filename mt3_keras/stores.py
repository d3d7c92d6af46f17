"""Files by path or address: local ones, and those that Apache Beam's file systems know.

An address such as s3://bucket/song.flac is read and written by Beam (`pip install
'apache-beam[aws]'`, `[gcp]`, `[azure]`, `[hadoop]`). Local files need no Beam.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mt3_keras.audio import AUDIO_SUFFIXES, find_audio
from mt3_keras.files import open_regular, replacing
from mt3_keras.segments import AudioError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BLOCK_BYTES = 2**20


_beam_args: tuple[str, ...] = ()


def configure(beam_args: Sequence[str]) -> None:
    """Has this process open remote files with Beam's flags, such as --hdfs_host.

    Args:
      beam_args: flags of Beam, of any kind.
    """
    global _beam_args
    _beam_args = tuple(beam_args)


class StoredFile(NamedTuple):
    """A file that was found; `time` is when it last changed, in seconds since 1970."""

    path: str
    num_bytes: int
    time: float


def is_local(path: str) -> bool:
    """Whether a path is of this machine, as opposed to an address such as s3://bucket/name."""
    return not _ADDRESS.match(path)


def read_whole(path: str) -> bytes | None:
    """The content of a file; None if there is no such file."""
    if is_local(path):
        try:
            return pathlib.Path(path).read_bytes()
        except FileNotFoundError:
            return None
    if not _file_systems().exists(path):
        return None
    with _open_remote(path) as file:
        return file.read()


def read_json(path: str) -> Any:
    """The content of a JSON file; None if it is not there or, as a store may leave it, not whole.

    Such a file is written last, so that what it describes is made again.
    """
    content = read_whole(path)
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def write_whole(path: str, content: bytes) -> None:
    """Writes a file and the folders above it; locally it appears whole or not at all.

    Object stores do the same; HDFS may leave a part of the file where the writer is killed.
    """
    if is_local(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        return
    from apache_beam.io.filesystem import CompressionTypes

    with _file_systems().create(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(content)


def remove(path: str) -> None:
    """Removes a file, or a folder with its files; nothing happens where there is none."""
    if is_local(path):
        if pathlib.Path(path).is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            pathlib.Path(path).unlink(missing_ok=True)
        return
    if found := [file.path for file in [*_match(path), *_match(f"{path}/*")]]:
        _file_systems().delete(found)


def list_files(folder: str, pattern: str) -> list[StoredFile]:
    """The files of a folder that match a pattern with * and ?, sorted."""
    if not is_local(folder):
        return _match(f"{folder}/{pattern}")
    found = []
    for path in sorted(pathlib.Path(folder).glob(pattern)):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            status = path.stat()
            found.append(StoredFile(str(path), status.st_size, status.st_mtime))
    return found


def find_recordings(inputs: list[str]) -> list[str]:
    """Files, folders and patterns, local or remote -> the recordings they mean, each once.

    Raises:
      AudioError: one of them means nothing (see `find_audio`).
    """
    found = [str(path) for path in find_audio([path for path in inputs if is_local(path)])]
    for pattern in (path for path in inputs if not is_local(path)):
        is_folder = pattern.endswith("/")
        paths = [file.path for file in _match(f"{pattern}**" if is_folder else pattern)]
        if is_folder:
            paths = [p for p in paths if pathlib.PurePosixPath(p).suffix.lower() in AUDIO_SUFFIXES]
        if not paths:
            raise AudioError(f"{pattern}: no recordings; folders of a store end in /")
        found += paths
    return list(dict.fromkeys(found))


def read_list(path: str) -> list[str]:
    """The lines of a text file, each a recording; empty ones are left out.

    Raises:
      AudioError: there is no such file, or it is no text, or holds nothing.
    """
    content = read_whole(path)
    if content is None:
        raise AudioError(f"{path}: no such file; check the name")
    try:
        lines = [line.strip("\r") for line in content.decode().split("\n")]
    except UnicodeDecodeError as error:
        raise AudioError(f"{path}: is no list of files in UTF-8, one a line") from error
    if not (found := [line for line in lines if line.strip()]):
        raise AudioError(f"{path}: names no recording; write one a line")
    return list(dict.fromkeys(found))


def read_column(path: str, column: str) -> list[str]:
    """The texts of a column of a Parquet or CSV file, each a recording.

    Raises:
      AudioError: there is no such file or column, or it holds no texts.
    """
    import pyarrow
    from pyarrow import csv, parquet

    content = read_whole(path)
    if content is None:
        raise AudioError(f"{path}: no such file; check the name")
    try:
        if path.lower().endswith(".csv"):
            table = csv.read_csv(io.BytesIO(content))
        else:
            table = parquet.read_table(io.BytesIO(content))
    except pyarrow.ArrowException as error:
        raise AudioError(f"{path}: is no table in Parquet or CSV ({error})") from error
    if column not in table.column_names:
        names = ", ".join(table.column_names)
        raise AudioError(f"{path}: has no column {column!r}: give --column, one of {names}")
    found = [value for value in table.column(column).to_pylist() if value]
    if not found or not isinstance(found[0], str):
        raise AudioError(f"{path}: column {column!r} names no recordings")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def fetch(path: str) -> Iterator[tuple[pathlib.Path, str]]:
    """A file's local path, of a copy if it is remote, and the SHA-256 digest of its content.

    Raises:
      AudioError: a local file is missing, empty or cannot be read.
      OSError: a remote one cannot be read.
    """
    digest = hashlib.sha256()
    if is_local(path):
        with open_regular(path, AudioError) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        yield pathlib.Path(path), digest.hexdigest()
        return
    suffix = pathlib.PurePosixPath(path).suffix
    with tempfile.NamedTemporaryFile(prefix="mt3-", suffix=suffix) as copy:
        with _open_remote(path) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                copy.write(block)
        copy.flush()
        yield pathlib.Path(copy.name), digest.hexdigest()


def _file_systems() -> Any:
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions

    FileSystems.set_options(PipelineOptions(list(_beam_args)))
    return FileSystems


def _open_remote(path: str) -> Any:
    from apache_beam.io.filesystem import CompressionTypes

    return _file_systems().open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def _match(pattern: str) -> list[StoredFile]:
    (result,) = _file_systems().match([pattern])
    return sorted(
        StoredFile(file.path, file.size_in_bytes, file.last_updated_in_seconds)
        for file in result.metadata_list
    )
