"""Recordings -> notes on Spark, as a DataFrame of one row a note.

    from mt3_keras import spark

    recordings = session.read.format("binaryFile").load("s3a://bucket/music/*.flac")
    notes = spark.transcribe(recordings.repartition(1000))
    notes.filter("error IS NULL").drop("error").write.parquet("s3a://bucket/notes")

What a task does is lost when its executor ends, and is done again by another, as everywhere in
Spark. Executors need this package, and a core for each task (`spark.task.cpus=1`, the default).
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mt3_keras.archive_worker import describe_failure, engine_of_thread
from mt3_keras.note_table import note_records, note_schema

if TYPE_CHECKING:
    import pyarrow
    from pyspark.sql import DataFrame

SCHEMA = (
    "recording string, onset double, offset double, pitch short, velocity short, program short,"
    " is_drum boolean, instrument string, confidence float, error string"
)


def transcribe(recordings: DataFrame, model: str = "small", **options: Any) -> DataFrame:
    """Transcribes the recordings that a DataFrame names or holds.

    It is Spark's `mapInArrow`: the rows are those of `mt3 archive`, types and nulls included, which
    pandas would change on the way.

    Args:
      recordings: with the column `path`, a path as the executors find it; or, as Spark's source
        "binaryFile" gives it, the content as well in the column `content`.
      model: see `Transcriber.from_preset`; on all executors.
      **options: of `Transcriber.from_preset`.

    Returns:
      A row for each note (`SCHEMA`), and one for each recording that could not be used, all null
      but for `recording` and `error`, the reason. Recordings without notes have no row.

    Raises:
      ValueError: there is no column `path`.
    """
    names = [name for name in ("path", "content") if name in recordings.columns]
    if "path" not in names:
        raise ValueError(f"recordings must have a column path: got {', '.join(recordings.columns)}")

    def work(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        yield from transcribe_batches(batches, model, options)

    return recordings.select(*names).mapInArrow(work, SCHEMA)


def transcribe_batches(
    batches: Iterable[pyarrow.RecordBatch], model: str, options: dict[str, Any]
) -> Iterator[pyarrow.RecordBatch]:
    """What an executor does; a batch of rows for each recording.

    Args:
      batches: with the columns of `transcribe`.
      model: see there.
      options: see there.
    """
    import pyarrow

    # Spark has no unsigned numbers.
    schema = note_schema(pyarrow.int16()).append(pyarrow.field("error", pyarrow.string()))
    transcriber = engine_of_thread(model, options)
    for row in (row for batch in batches for row in batch.to_pylist()):
        try:
            with _opening(row["path"], row.get("content")) as file:
                found = transcriber.transcribe(file)
            records = note_records(found.notes, found.confidences)
        except Exception as error:  # of any kind: it affects this recording only
            records = [{"error": describe_failure(error, row["path"])}]
        rows = [{"recording": row["path"], **record} for record in records]
        yield pyarrow.RecordBatch.from_pylist(rows, schema)


@contextlib.contextmanager
def _opening(path: str, content: bytes | None) -> Iterator[pathlib.Path]:
    if content is None:
        yield pathlib.Path(path)
        return
    suffix = pathlib.PurePosixPath(path).suffix
    with tempfile.NamedTemporaryFile(prefix="mt3-", suffix=suffix) as copy:
        copy.write(content)
        copy.flush()
        yield pathlib.Path(copy.name)
