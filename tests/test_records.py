"""Records and shards: what is prepared comes back, and nothing stops or spoils the rest."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mt3_keras.data.example import Example, Label
from mt3_keras.data.records import (
    MARGIN_SAMPLES,
    PIECE_SAMPLES,
    Records,
    RecordsError,
    decode_record,
    encode_record,
    find_records,
)
from mt3_keras.data.shards import (
    TOLERATED_ONSET,
    Loaded,
    Source,
    cut_pieces,
    example_source,
    write_records,
)
from mt3_keras.notes import Note
from tests.conftest import ROOT

NOTE = Note(0.2, 0.7, 60, 100)


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """As a file of 16 bits holds it."""
    values = np.random.default_rng(seed).integers(-(2**15), 2**15, num_samples)
    return (values / 2**15).astype(np.float32)


def load(seed: int, seconds: float = 1.0) -> tuple[NDArray[np.float32], list[Note]]:
    return noise(round(16_000 * seconds), seed), [NOTE._replace(pitch=40 + seed)]


def make_sources(count: int) -> list[Source]:
    return [Source(f"piece {i}", functools.partial(load, i)) for i in range(count)]


def write(folder: pathlib.Path, sources: list[Source], **options: Any) -> dict[str, Any]:
    options = {"num_shards": 2, "num_workers": 1, **options}
    return write_records(sources, folder, name="test", split="train", **options)


# --- records ------------------------------------------------------------------------------------


def test_a_record_survives_a_round_trip() -> None:
    (record,) = cut_pieces("an id", noise(20_000), [NOTE, NOTE._replace(is_drum=True)])
    back = decode_record(encode_record(record))
    assert back.pcm.dtype == np.int16
    np.testing.assert_array_equal(back.pcm, record.pcm)
    assert back._replace(pcm=record.pcm) == record


def test_samples_of_16_bits_come_back_exactly() -> None:
    samples = noise(30_000)
    (record,) = cut_pieces("x", samples, [NOTE])
    np.testing.assert_array_equal(record.samples(0, 30_000), samples)


@pytest.mark.parametrize("peak", [1.0, 3.7])
def test_samples_beyond_full_scale_are_not_clipped(peak: float) -> None:
    samples = noise(30_000) * np.float32(peak)
    samples[7] = peak
    (record,) = cut_pieces("x", samples, [NOTE])
    np.testing.assert_allclose(record.samples(0, 30_000), samples, atol=peak / 2**15)


@pytest.mark.parametrize(
    "num_samples", [1, PIECE_SAMPLES, PIECE_SAMPLES + 1, PIECE_SAMPLES + 5000, 600_000]
)
@pytest.mark.parametrize("block", [100_000, 10**6])
def test_pieces_side_by_side_are_the_audio_with_true_margins(num_samples: int, block: int) -> None:
    samples = noise(num_samples)
    blocks = [samples[i : i + block] for i in range(0, num_samples, block)]
    records = list(cut_pieces("x", blocks, [NOTE]))
    joined = np.concatenate([record.samples(0, record.num_samples) for record in records])
    np.testing.assert_array_equal(joined, samples)
    padded = np.pad(samples, (MARGIN_SAMPLES, PIECE_SAMPLES + MARGIN_SAMPLES))
    for i, record in enumerate(records):
        reach = record.num_samples + MARGIN_SAMPLES
        window = padded[i * PIECE_SAMPLES :][: MARGIN_SAMPLES + reach]
        np.testing.assert_array_equal(record.samples(-MARGIN_SAMPLES, reach), window)
        assert record.first_sample == i * PIECE_SAMPLES
        assert record.is_last == (i == len(records) - 1)


def test_a_piece_does_not_carry_the_notes_of_others() -> None:
    notes = [NOTE._replace(onset=float(t), offset=t + 0.5) for t in range(40)]
    counts = [len(r.notes) for r in cut_pieces("x", noise(40 * 16_000), notes)]
    assert counts == [17, 17, 8]  # those just beyond a border count, for the time grid rounds


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no record"),
        (b"\xc1", "no record"),
        (msgpack.packb({"version": 1}), "no record"),
        (msgpack.packb({"version": 99}), "version 99"),
        (msgpack.packb([1, 2]), "no record"),
    ],
)
def test_what_is_no_record_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_record(data)


# --- shards -------------------------------------------------------------------------------------


def test_all_examples_are_in_the_shards_once_and_in_order(tmp_path: pathlib.Path) -> None:
    summary = write(tmp_path, make_sources(5))
    (records,) = find_records([tmp_path], "train")
    assert len(records) == summary["num_records"] == 5
    for i in range(5):
        assert records[i].id == f"piece {i}"
        np.testing.assert_array_equal(records[i].samples(0, 16_000), load(i)[0])
        assert records[i].notes == load(i)[1]
    assert summary["hours"] == pytest.approx(5 / 3600)
    assert summary["instruments"] == {"Acoustic Grand Piano": 5}
    names = sorted(path.name for path in tmp_path.glob("*.array_record"))
    assert names == [f"test-train-{i:05d}-of-00002.array_record" for i in range(2)]
    assert not list(tmp_path.glob(".*"))


def test_two_processes_write_what_one_writes(tmp_path: pathlib.Path) -> None:
    summaries = [
        write(tmp_path / str(num), make_sources(4), num_workers=num, num_shards=4) for num in (1, 2)
    ]
    assert summaries[0] == summaries[1]
    for path in (tmp_path / "1").glob("*.array_record"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_stems_of_different_length_are_summed(tmp_path: pathlib.Path) -> None:
    stems = [noise(n, seed=n) * np.float32(0.25) for n in (300_000, 100, 280_001)]
    for i, stem in enumerate(stems):
        soundfile.write(tmp_path / f"{i}.wav", stem, 16_000, subtype="FLOAT")
    paths = tuple(tmp_path / f"{i}.wav" for i in range(3))
    example = Example("x", "test", "train", paths, (Label(tmp_path),), lambda label: [NOTE])
    pieces = list(cut_pieces("x", *example_source(example).load()))
    total = np.zeros(300_000, np.float32)
    for stem in stems:
        total[: stem.size] += stem
    found = np.concatenate([piece.samples(0, piece.num_samples) for piece in pieces])
    np.testing.assert_allclose(found, total, atol=2**-15)


def load_spoiled(kind: str) -> Loaded:
    samples, notes = load(0, 17.0)
    if kind == "nan":
        samples[-1] = np.nan
    if kind == "late":
        notes = [NOTE, NOTE._replace(onset=17 + TOLERATED_ONSET + 0.1, offset=20.0)]
    if kind == "silent":
        notes = []
    if kind == "empty":
        samples = samples[:0]
    if kind == "short":
        notes = [NOTE._replace(offset=NOTE.onset)]
    if kind == "failing":
        raise RuntimeError("the renderer failed\nfor some reason")
    return samples, notes


REASONS = {
    "nan": "finite",
    "late": "audio ends at 17.0 s, its notes go on to 18.1 s",
    "silent": "no notes",
    "empty": "no audio",
    "short": "must end after it starts",
    "failing": "the renderer failed for some reason",
}


def test_examples_that_cannot_be_used_are_left_out_with_the_reason(tmp_path: pathlib.Path) -> None:
    spoiled = [Source(kind, functools.partial(load_spoiled, kind)) for kind in REASONS]
    summary = write(tmp_path, [*spoiled, *make_sources(2)])
    skipped = {skip["id"]: skip["reason"] for skip in summary["skipped"]}
    assert list(skipped) == list(REASONS)
    for kind, reason in REASONS.items():
        assert reason in skipped[kind] and "\n" not in skipped[kind]
    (records,) = find_records([tmp_path], "train")
    assert [records[i].id for i in range(len(records))] == ["piece 0", "piece 1"]
    assert summary["num_examples"] == 2


def test_if_no_example_can_be_used_the_first_reason_is_the_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecordsError, match=r"none of the 1 examples .* no notes"):
        write(tmp_path, [Source("bad", functools.partial(load_spoiled, "silent"))])
    with pytest.raises(RecordsError, match="no examples"):
        write(tmp_path, [])
    mended = [Source("bad", functools.partial(load, 0))]
    assert write(tmp_path, mended)["num_records"] == 1


def kill_once(flag: str, seed: int) -> Loaded:
    path = pathlib.Path(flag)
    if seed == 2 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return load(seed)


def killable(folder: pathlib.Path) -> list[Source]:
    flag = str(folder / "killed")
    return [Source(f"piece {i}", functools.partial(kill_once, flag, i)) for i in range(4)]


def test_killed_between_shards_it_goes_on_and_keeps_the_finished(tmp_path: pathlib.Path) -> None:
    script = (
        "import pathlib; from tests.test_records import *; "
        f"folder = pathlib.Path({str(tmp_path)!r}); write(folder, killable(folder))"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    first = tmp_path / "test-train-00000-of-00002.array_record"
    before = first.stat()
    with pytest.raises(RecordsError, match="not finished"):
        find_records([tmp_path], "train")
    write(tmp_path, killable(tmp_path))
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    whole = write(tmp_path / "whole", make_sources(4))
    for shard in whole["shards"]:
        there = (tmp_path / "whole" / shard["file"]).read_bytes()
        assert (tmp_path / shard["file"]).read_bytes() == there
    assert not list(tmp_path.glob(".*"))


def test_records_made_otherwise_are_not_mixed_up(tmp_path: pathlib.Path) -> None:
    write(tmp_path, make_sources(4), options={"bass": "written"})
    with pytest.raises(RecordsError, match="choose another out_dir"):
        write(tmp_path, make_sources(4), options={"bass": "sounding"})
    with pytest.raises(RecordsError, match="choose another out_dir"):
        write(tmp_path, make_sources(3), options={"bass": "written"})
    write(tmp_path, make_sources(4), num_shards=4)  # its files have other names
    (records,) = find_records([tmp_path], "train")
    assert len(records) == 4


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("written")
    write(folder, make_sources(4))
    return folder


@pytest.fixture
def copy(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "other"])
def test_a_damaged_shard_is_named_and_can_be_written_anew(
    copy: pathlib.Path, written: pathlib.Path, damage: str
) -> None:
    path = copy / "test-train-00001-of-00002.array_record"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "flip":
        path.write_bytes(content[:500] + bytes(b ^ 255 for b in content[500:600]) + content[600:])
    if damage == "gone":
        path.unlink()
    if damage == "other":
        path.write_bytes(bytes(len(content)))
    with pytest.raises(RecordsError) as caught:
        (records,) = find_records([copy], "train")
        for i in range(len(records)):
            _ = records[i].id
    message = str(caught.value)
    assert str(path) in message and "train.prepare" in message and "\n" not in message
    if damage in ("flip", "other"):  # of the right size: it must be deleted, as the message says
        assert "delete" in message
        path.unlink()
    write(copy, make_sources(4))
    assert path.read_bytes() == (written / path.name).read_bytes()


def test_a_damaged_description_is_named(copy: pathlib.Path) -> None:
    path = copy / "test-train.json"
    for content in ("", "{}", "[]", json.dumps({"num_records": 1})):
        path.write_text(content)
        with pytest.raises(RecordsError, match=r"test-train\.json: damaged"):
            find_records([copy], "train")


def test_a_folder_without_records_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecordsError, match=r"no records; run train\.prepare with --split test"):
        find_records([tmp_path], "test")


def test_records_refuse_an_index_beyond_their_end(written: pathlib.Path) -> None:
    records = Records(written / "test-train.json")
    assert records[-1].id == "piece 3"
    for index in (4, -5):
        with pytest.raises(IndexError):
            records[index]
