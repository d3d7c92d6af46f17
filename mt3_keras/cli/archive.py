"""Transcribes an archive of recordings on all cores or on a cluster.

    mt3 archive "music/**/*.flac" --output_dir notes
    mt3 archive --files list.txt --output_dir OUT --runner DaskRunner -- --dask_client_address=URL

Recordings are files, folders, patterns, the lines of --files, or a column of --table; paths, or
addresses that Beam's file systems know (s3://, gs://, hdfs://). Stopped, it is resumed by the same
command; given more recordings, it adds theirs. A recording that cannot be used is a line of
failed-*.jsonl, and does not stop the rest. The work is Apache
Beam's; what follows `--` are its flags.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from mt3_keras.cli.command_line import Command, Flags, UsageError
from mt3_keras.cli.model_flags import define_model_flags, transcriber_options
from mt3_keras.process import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_REASONS = 10  # that are printed


def define_list_flag(add: Flags) -> None:
    """Adds --files, which `stores.read_list` reads."""
    add.text("files", None, "A text file that names recordings, one a line.")


def _define_flags(add: Flags) -> None:
    define_model_flags(add)
    define_list_flag(add)
    add.text("table", "", "A Parquet or CSV file that names recordings in a column.")
    add.text("column", "recording", "The column of --table.")
    add.text("output_dir", "", "Folder of the archive, or its address in a store.")
    add.count(
        "num_shards", 0, "Of a new archive; 0 is one for each 50 recordings, at least 16.", least=0
    )
    add.count("num_workers", 0, "Processes of the local runner; 0 is one for each core.", least=0)
    add.text("runner", "", "Beam's runner, such as DaskRunner; by default on this machine.")
    add.number(
        "section_minutes",
        10.0,
        "Longer recordings are cut into sections of about this length, for several workers.",
        least=1.0,
    )


def _archive(values: flags.FlagValues, arguments: list[str], beam_args: list[str]) -> int:
    if not values.output_dir:
        raise UsageError("--output_dir is needed: the folder of the archive")
    if values.threads:
        raise UsageError("--threads is of other commands: a worker takes one core; --num_workers")
    if values.runner:
        beam_args = [*beam_args, f"--runner={values.runner}"]
    from mt3_keras import beam, stores
    from mt3_keras.archive import transcribe_archive

    stores.configure(beam_args)
    options = {k: v for k, v in transcriber_options(values).items() if v not in (None, "auto")}
    recordings = _find(values, arguments)
    began = time.time()

    def count() -> int:
        written = stores.list_files(f"{values.output_dir}/shards", "*-of-*.json")
        return sum(file.time >= began for file in written)

    try:
        with beam.progress("archive", "shards", count):
            manifest = transcribe_archive(
                recordings,
                values.output_dir,
                model=values.model or "small",
                options=options,
                num_shards=values.num_shards,
                section_minutes=values.section_minutes,
                num_workers=values.num_workers,
                beam_args=beam_args,
            )
    except KeyboardInterrupt as stopped:
        stopped.args = ("stopped; run it again to go on",)
        raise
    return _report(manifest, len(recordings), values.output_dir)


def _find(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    from mt3_keras import stores

    found = stores.find_recordings(arguments) if arguments else []
    if values.files:
        found += stores.read_list(values.files)
    if values.table:
        found += stores.read_column(values.table, values.column)
    if not found:
        raise UsageError("name recordings, --files or --table")
    return found


def _report(manifest: Mapping[str, Any], num_given: int, folder: str) -> int:
    last = manifest["last_run"]
    for reason, number in list(last["failures"].items())[:MAX_REASONS]:
        print(f"failed: {number} x {printable(reason)}", file=sys.stderr)
    speed = last["audio_seconds"] / last["work_seconds"] if last["work_seconds"] else 0.0
    print(
        f"{last['transcribed']} of {num_given} recordings transcribed now, {last['failed']} failed"
        + (f", {speed:.0f}x real time for each worker" if speed else "")
        + f"; in all {manifest['recordings']} recordings, {manifest['hours']:.2f} h,"
        f" {manifest['notes']} notes, in {folder}"
    )
    return 0 if manifest["recordings"] else 1


COMMAND = Command(
    "[FILE_FOLDER_OR_PATTERN ...] --output_dir=DIR [FLAGS] [-- BEAM_FLAGS]",
    __doc__,
    _define_flags,
    _archive,
    takes_arguments=True,
    packages=("apache_beam", "pyarrow"),
    passes_on=True,
)
