"""`mt3 archive`, `mt3_keras.spark`, `mt3 transcribe --shard`: many recordings, several workers."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys

import numpy as np
import pytest
import soundfile

from mt3_keras import Transcriber, __version__, beam, stores
from mt3_keras.__main__ import main
from mt3_keras.archive import transcribe_archive
from mt3_keras.archive_worker import (
    BEGUN,
    ArchiveError,
    Shard,
    _Deaths,
    fingerprint_model,
    shard_of,
    transcribe_shard,
)
from mt3_keras.models.config import MT3, SMALL
from mt3_keras.note_table import describe_source, note_records
from mt3_keras.outputs import RollOutput, TokenOutput
from mt3_keras.sections import cut_section, cut_sections, pack, unpack
from mt3_keras.segments import AudioError, cut_segments

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="needs apache_beam: the extra [archives]",
)
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs distributed: [archives]"
)


def write_tone(path: pathlib.Path, hz: float, seconds: float = 1.0) -> None:
    """A plucked string of five partials, a tenth of a second after the start."""
    time = np.arange(round(16_000 * seconds)) / 16_000 - 0.1
    partials = sum(np.sin(2 * np.pi * hz * k * time) / k for k in range(1, 6))
    sound = np.where(time < 0, 0, 0.2 * partials * np.exp(-3 * np.maximum(time, 0)))
    soundfile.write(path, sound, 16_000)


@pytest.fixture
def music(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four recordings of a note each and a damaged one."""
    folder = tmp_path / "music"
    folder.mkdir()
    for number, hz in enumerate((220, 330, 440, 660)):
        write_tone(folder / f"{number}.wav", hz)
    (folder / "bad.wav").write_bytes(b"no sound")
    return folder


@functools.cache
def transcriber() -> Transcriber:
    return Transcriber.from_preset("small")


def notes_of(path: pathlib.Path) -> list[dict]:
    result = transcriber().transcribe(path)
    return note_records(result.notes, result.confidences)


def read_lines(folder: pathlib.Path | str, pattern: str = "recordings-*.jsonl") -> list[dict]:
    files = sorted(pathlib.Path(folder).glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def read_rows(folder: pathlib.Path) -> list[dict]:
    from pyarrow import parquet

    files = sorted(folder.glob("notes-*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def assert_holds(folder: pathlib.Path, music: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The archive has the notes, and bytes of MIDI files, that `mt3 transcribe` writes."""
    alone = tmp_path / "alone"
    assert main(["transcribe", str(music), f"--output_dir={alone}", "--noprogress"]) == 1
    lines = read_lines(folder)
    assert sorted(line["recording"] for line in lines) == [
        str(music / f"{i}.wav") for i in range(4)
    ]
    rows = read_rows(folder)
    for line in lines:
        path = pathlib.Path(line["recording"])
        assert line["notes"] == notes_of(path) != []
        expected = alone / f"{path.stem}.mid"
        assert (folder / line["midi"]).read_bytes() == expected.read_bytes()
        own = [row for row in rows if row["recording"] == line["recording"]]
        assert [row["onset"] for row in own] == [note["onset"] for note in line["notes"]]
    (failed,) = read_lines(folder, "failed-*.jsonl")
    assert failed["recording"] == str(music / "bad.wav")
    assert "audio" in failed["reason"] and "bad.wav: " not in failed["reason"].partition("(")[0]


@needs_beam
def test_an_archive_holds_the_notes_of_each_recording_alone(music, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["archive", str(music), f"--output_dir={out}", "--num_workers=2", "--num_shards=2"]
    assert main(command) == 0
    assert "4 of 5 recordings transcribed now, 1 failed" in capsys.readouterr().out
    assert_holds(out, music, tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["recordings"], manifest["last_run"]["failed"]) == (4, 1)
    assert not list(out.rglob("*.begun"))


# --- one shard, in this process ---


def shard_over(recordings: list[str], out: str, **changes) -> Shard:
    """The only shard of an archive, about to be transcribed."""
    values = {
        **{"folder": out, "name": "00000-of-00001", "run": os.urandom(4).hex(), "model": "small"},
        "version": __version__,
        **{"fingerprint": fingerprint_model("small"), "options": {}, "section_seconds": 600.0},
        **changes,
    }
    shard = Shard(**values)
    inputs = {"run": shard.run, "recordings": recordings}
    stores.write_whole(f"{out}/inputs.json", json.dumps(inputs).encode())
    return shard


def test_only_what_is_new_changed_or_failed_is_transcribed_again(music, tmp_path):
    pytest.importorskip("pyarrow")
    out, names = str(tmp_path / "out"), [str(path) for path in sorted(music.iterdir())]
    assert transcribe_shard(shard_over(names[:3], out))["transcribed"] == 3
    before = {path: path.read_bytes() for path in pathlib.Path(out).glob("*-of-*")}
    assert transcribe_shard(shard_over(names[:3], out))["transcribed"] == 0
    assert before == {path: path.read_bytes() for path in pathlib.Path(out).glob("*-of-*")}
    write_tone(music / "0.wav", 880)
    write_tone(music / "bad.wav", 550)
    report = transcribe_shard(shard_over(names, out))
    assert (report["transcribed"], report["failed"]) == (3, 0)  # 0, 3 and the mended one
    lines = {line["recording"]: line for line in read_lines(out)}
    assert {*lines} == {*names}
    assert all(line["notes"] == notes_of(pathlib.Path(name)) for name, line in lines.items())


def test_a_shard_whose_table_was_not_written_whole_is_completed(music, tmp_path):
    pytest.importorskip("pyarrow")
    out, names = tmp_path / "out", [str(music / "0.wav")]
    transcribe_shard(shard_over(names, str(out)))
    rows = read_rows(out)
    (table,) = out.glob("notes-*.parquet")
    table.write_bytes(table.read_bytes()[:100])
    assert transcribe_shard(shard_over(names, str(out)))["transcribed"] == 0
    assert read_rows(out) == rows != []


def test_a_recording_that_is_gone_keeps_its_notes_and_one_that_was_spoilt_does_not(music, tmp_path):
    pytest.importorskip("pyarrow")
    out, names = str(tmp_path / "out"), [str(music / "0.wav"), str(music / "1.wav")]
    transcribe_shard(shard_over(names, out))
    (music / "0.wav").unlink()
    (music / "1.wav").write_bytes(b"spoilt")
    assert transcribe_shard(shard_over(names, out))["failed"] == 2
    assert [line["recording"] for line in read_lines(out)] == names[:1]
    assert len(list(pathlib.Path(out).glob("midi/*/*"))) == 1


def test_a_recording_at_which_three_workers_of_a_run_were_killed_is_given_up(music, tmp_path):
    pytest.importorskip("pyarrow")
    names = [str(music / "0.wav"), str(music / "1.wav")]
    shard = shard_over(names, str(tmp_path / "out"))
    for _ in range(3):
        _Deaths(shard).begin(names[0])  # and never ended
    report = transcribe_shard(shard)
    assert (report["transcribed"], report["failed"]) == (1, 1)
    (failed,) = read_lines(shard.folder, "failed-*.jsonl")
    assert "worker process was killed 3 times" in failed["reason"]
    assert not pathlib.Path(shard.path(BEGUN)).exists()
    assert transcribe_shard(shard_over(names, shard.folder))["transcribed"] == 1  # the next run


@pytest.mark.parametrize("name", ["fingerprint", "version"])
def test_workers_with_another_model_or_package_stop_the_run(music, tmp_path, name):
    shard = shard_over([str(music / "0.wav")], str(tmp_path), **{name: "another"})
    with pytest.raises(ArchiveError, match="give all workers the same version"):
        transcribe_shard(shard)


def test_a_recording_is_in_the_same_shard_whatever_others_there_are():
    names = [shard_of(f"{number}.wav", 8) for number in range(400)]
    assert {*names} == {f"{i:05d}-of-00008" for i in range(8)}
    assert names[7] == shard_of("7.wav", 8)


@needs_beam
@pytest.mark.parametrize("change", [{"num_shards": 3}, {"options": {}}])
def test_an_archive_made_otherwise_is_refused_before_any_work(music, tmp_path, change):
    stored = {"version": 1, "model": fingerprint_model("small")}
    stored |= {"options": {"least_confidence": 0.5}, "num_shards": 2}
    (tmp_path / "archive.json").write_text(json.dumps(stored))
    given = {"options": {"least_confidence": 0.5}} | change
    with pytest.raises(ArchiveError, match=next(iter(change))):
        transcribe_archive([str(music / "0.wav")], str(tmp_path), **given)
    assert not (tmp_path / "inputs.json").exists()


@needs_beam
def test_a_store_that_beam_knows_holds_the_same_archive(music, tmp_path, monkeypatch):
    from apache_beam.io.localfilesystem import LocalFileSystem

    class Store(LocalFileSystem):
        """Addresses test-store:///PATH."""

        @classmethod
        def scheme(cls):
            return "test-store"

        def _list(self, folder):
            for file in super()._list(folder.removeprefix("test-store://")):
                file.path = f"test-store://{file.path}"
                yield file

        def _path_open(self, path, *arguments):
            return super()._path_open(path.removeprefix("test-store://"), *arguments)

        def create(self, path, *arguments, **options):
            return super().create(path.removeprefix("test-store://"), *arguments, **options)

        def exists(self, path):
            return super().exists(path.removeprefix("test-store://"))

        def metadata(self, path):
            found = super().metadata(path.removeprefix("test-store://"))
            found.path = path
            return found

        def delete(self, paths):
            for path in paths:
                pathlib.Path(path.removeprefix("test-store://")).unlink()

    seen = []
    monkeypatch.setattr(
        Store, "__init__", lambda self, pipeline_options: seen.append(pipeline_options)
    )
    root = f"test-store://{tmp_path}"
    names = stores.find_recordings([f"{root}/music/"])
    assert names == [f"{root}/music/{name}.wav" for name in ("0", "1", "2", "3", "bad")]
    stores.write_whole(f"{root}/list.txt", "\n".join(names).encode())
    assert stores.read_list(f"{root}/list.txt") == names
    shard = shard_over(names, f"{root}/out", beam_args=["--hdfs_host=host"])
    report = transcribe_shard(shard)
    assert (report["transcribed"], report["failed"]) == (4, 1)
    assert seen[0].get_all_options()["hdfs_host"] is None
    assert seen[-1].get_all_options()["hdfs_host"] == "host"
    out = tmp_path / "out"
    for line in read_lines(out):
        assert line["notes"] == notes_of(music / line["recording"].rpartition("/")[2])
        assert (out / line["midi"]).exists()
    (failed,) = read_lines(out, "failed-*.jsonl")
    assert not failed["reason"].startswith("/")  # of the copy that was read
    assert transcribe_shard(shard_over(names, f"{root}/out"))["transcribed"] == 0


# --- long recordings ---


@pytest.mark.parametrize("context", ["full", "segment"])
@pytest.mark.parametrize("config", [SMALL, MT3])
@pytest.mark.parametrize("seconds", [0.0, 30.0, 65.536, 70.0])
def test_the_segments_of_sections_are_those_of_the_whole(seconds, config, context):
    samples = np.random.default_rng(0).normal(size=round(seconds * 16_000)).astype(np.float32)
    whole = list(cut_segments([samples], config, context))
    sections = list(cut_sections(np.array_split(samples, 37), config, 10.0))
    parts = [list(cut_section(section, config, context)) for section in sections]
    assert all(
        section.num_segments in (len(part), None)
        for section, part in zip(sections, parts, strict=True)
    )
    joined = [segment for part in parts for segment in part]
    assert [(s.start, s.num_frames) for s in joined] == [(s.start, s.num_frames) for s in whole]
    for ours, theirs in zip(joined, whole, strict=True):
        assert np.array_equal(ours.samples, theirs.samples)
    assert len(sections) > 1 or seconds < 10


def test_outputs_come_back_from_a_file_as_they_were():
    tokens = [TokenOutput([3, 4, 1]), TokenOutput([1]), TokenOutput([])]
    assert unpack(pack(tokens)) == tokens
    rng = np.random.default_rng(0)
    rolls = [
        RollOutput(
            *(
                rng.random((n, width), np.float32)
                for n, width in zip(counts, (5, 128, 4, 88), strict=True)
            )
        )
        for counts in ((2, 2, 0, 256), (0, 0, 3, 256))
    ]
    for ours, theirs in zip(unpack(pack(rolls)), rolls, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


@needs_beam
def test_a_long_recording_that_workers_share_has_the_notes_of_the_whole(tmp_path, monkeypatch):
    # In this process, which is as quick.
    monkeypatch.setattr(beam, "run", lambda items, work, **_: [work(item) for item in items])
    long = soundfile.SoundFile(tmp_path / "long.wav", "w", 16_000, 1)
    for hz in (220, 440, 330, 550) * 4:
        write_tone(tmp_path / "note.wav", hz, seconds=3.0)
        long.write(soundfile.read(tmp_path / "note.wav")[0])
    long.close()
    name, out = str(tmp_path / "long.wav"), tmp_path / "out"
    shutil.copy(name, tmp_path / "copy.wav")  # the same content twice
    names = [name, str(tmp_path / "copy.wav")]
    transcribe_archive(names, str(out), section_minutes=0.2, num_shards=1)
    copied, line = read_lines(out)
    whole = transcriber().transcribe(name)
    assert copied["notes"] == line["notes"] == note_records(whole.notes, whole.confidences) != []
    assert line["duration"] == whole.duration
    whole.write_midi(tmp_path / "whole.mid", text=describe_source("small"))
    assert (out / line["midi"]).read_bytes() == (tmp_path / "whole.mid").read_bytes()
    assert not list(out.glob("sections/*"))


# --- runners ---


def die_once(folder: str) -> None:
    """Work that kills its process the first time."""
    marker = pathlib.Path(folder, "begun")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path(folder, "done").write_text(os.environ["OMP_NUM_THREADS"])


@needs_beam
def test_the_work_of_a_killed_worker_is_done_by_another_on_one_core(tmp_path):
    beam.run([str(tmp_path)], die_once, isolated=True)
    assert (tmp_path / "done").read_text() == "1"


def fail(item: str) -> None:
    """Work that cannot be done."""
    raise OSError(f"{item}: is full")


@needs_beam
def test_work_that_fails_is_one_line(tmp_path):
    with pytest.raises(beam.BeamError, match=r"^.*disk: is full.*$") as raised:
        beam.run(["disk"], fail)
    assert "\n" not in str(raised.value)


@needs_beam
@needs_dask
def test_a_dask_cluster_gives_the_same_archive(music, tmp_path):
    from distributed import LocalCluster

    out = tmp_path / "out"
    # Workers in this process: new ones take a minute to start where the machine is busy, and Dask
    # does not wait so long. `benchmarks.archives` has processes.
    with LocalCluster(
        **{"n_workers": 2, "threads_per_worker": 1, "processes": False},
        **{"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"},
    ) as cluster:
        transcribe_archive(
            stores.find_recordings([str(music)]),
            str(out),
            num_shards=2,
            beam_args=["--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"],
        )
    assert_holds(out, music, tmp_path)


def test_spark_gives_the_same_rows(music, monkeypatch):
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("needs Java, for example Debian's default-jre-headless")
    from pyspark.sql import SparkSession

    from mt3_keras import spark

    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    try:
        session.sparkContext.setLogLevel("OFF")
        found = session.read.format("binaryFile").load(str(music)).coalesce(1)
        rows = [row.asDict() for row in spark.transcribe(found).collect()]
        with pytest.raises(ValueError, match="must have a column path"):
            spark.transcribe(found.select("length"))
    finally:
        session.stop()
    for number in range(4):
        path = music / f"{number}.wav"
        own = [row for row in rows if row["recording"].endswith(path.name)]
        expected = [{k: v for k, v in note.items() if k != "confidence"} for note in notes_of(path)]
        assert [{k: row[k] for k in expected[0]} for row in own] == expected
    (failed,) = (row for row in rows if row["error"])
    assert failed["recording"].endswith("bad.wav") and failed["onset"] is None


# --- the command line ---


def test_shards_of_a_list_are_disjoint_and_all_of_it(music, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("\r\n".join(str(music / f"{number}.wav") for number in range(3)) + "\n\n")
    found = []
    for shard in ("1/2", "2/2"):
        out = tmp_path / shard[0]
        command = ["transcribe", f"--files={listed}", f"--shard={shard}", f"--output_dir={out}"]
        assert main([*command, "--noprogress"]) == 0
        found.append(sorted(path.name for path in out.iterdir()))
    assert found == [["0.mid", "2.mid"], ["1.mid"]]
    assert main([*command[:2], "--shard=4/4", f"--output_dir={tmp_path / 'none'}"]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_wrong_shard_is_refused(music, capsys, shard):
    assert main(["transcribe", str(music), f"--shard={shard}"]) == 2
    assert "--shard must be K/N" in capsys.readouterr().err


@needs_beam
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["x.wav"], 2, "--output_dir is needed"),
        (["--output_dir=o"], 2, "name recordings, --files or --table"),
        (["--output_dir=o", "--files=gone.txt"], 1, "gone.txt: no such file"),
        (["--output_dir=o", "gone.wav"], 1, "gone.wav: no such file or folder"),
        (["--output_dir=o", "x.wav", "--threads=2"], 2, "--num_workers"),
        (["--output_dir=o", "--files=empty.txt"], 1, "empty.txt: names no recording"),
    ],
)
def test_a_wrong_command_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["archive", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_recordings_are_named_by_a_column_of_a_table(tmp_path):
    csv = tmp_path / "songs.csv"
    csv.write_text("id,path\n1,a.wav\n2,b.wav\n3,\n")
    assert stores.read_column(str(csv), "path") == ["a.wav", "b.wav"]
    with pytest.raises(
        AudioError, match="has no column 'recording': give --column, one of id, path"
    ):
        stores.read_column(str(csv), "recording")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(AudioError, match="is no table in Parquet or CSV"):
        stores.read_column(str(tmp_path / "x.parquet"), "path")
