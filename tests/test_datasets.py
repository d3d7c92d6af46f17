"""The data sets' loaders, on real slices and on fixtures in their documented layouts."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pretty_midi
import pytest
import soundfile
import yaml

from mt3_keras.data import cerberus4, guitarset, maestro, musicnet, slakh, urmp
from mt3_keras.data.example import DatasetError, Example, Label, summarize
from mt3_keras.midi import read_instruments, read_midi, write_midi
from mt3_keras.notes import Note, check_notes, sort_notes, trim_overlaps

MODULES = (maestro, slakh, cerberus4, musicnet, guitarset, urmp)


@pytest.fixture(scope="session")
def slices(shared: pathlib.Path) -> pathlib.Path:
    return shared / "data" / "slices"


def touch(path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_audio(path: pathlib.Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(int(8000 * seconds), np.float32), 8000)


def write_part(
    path: pathlib.Path,
    notes: list[Note],
    pedal: tuple[tuple[float, int], ...] = (),
    is_drum: bool = False,
) -> None:
    part = pretty_midi.Instrument(program=0, is_drum=is_drum)
    part.notes = [pretty_midi.Note(n.velocity, n.pitch, n.onset, n.offset) for n in notes]
    part.control_changes = [pretty_midi.ControlChange(64, value, time) for time, value in pedal]
    midi = pretty_midi.PrettyMIDI(resolution=500)
    midi.instruments.append(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    midi.write(str(path))


# --- what every data set promises ---------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.NAME)
def test_every_data_set_has_the_same_members(module: Any, tmp_path: pathlib.Path) -> None:
    assert isinstance(module.NAME, str) and isinstance(module.SOURCE, str)
    assert set(module.SPLITS) <= {"train", "validation", "test"}
    assert callable(module.read_notes)
    with pytest.raises(ValueError, match=r"split of .* must be one of train"):
        module.find(tmp_path, "dev")


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.NAME)
def test_a_missing_or_empty_root_is_named_with_where_to_get_it(
    module: Any, tmp_path: pathlib.Path
) -> None:
    source = module.SOURCE.split()[0]
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(DatasetError) as caught:
            module.find(root, "train")
        assert str(root) in str(caught.value) and source in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_example_can_be_sent_to_another_process(slices: pathlib.Path) -> None:
    (example,) = guitarset.find(slices / "guitarset", "train", audio="mic", skip_missing=True)
    copy = pickle.loads(pickle.dumps(example))
    assert copy == example
    assert copy.load_notes() == example.load_notes()


def test_summaries_count_examples_hours_and_instruments(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "validation" / "Track01501", seconds=36.0)
    make_song(tmp_path / "validation" / "Track01502", seconds=36.0)
    text = summarize(slakh.find(tmp_path, "validation"))
    assert text.splitlines()[0] == "slakh validation: 2 examples, 0.02 h"
    assert "    0 Acoustic Grand Piano: 2" in text
    assert "   33 Electric Bass (finger): 2" in text
    assert "      Drums: 2" in text


def test_a_summary_opens_labels_where_only_they_name_the_instruments(slices: pathlib.Path) -> None:
    text = summarize(musicnet.find(slices / "musicnet_rendered_fixture", "train"))
    assert text.splitlines()[0] == "musicnet train: 2 examples, 0.01 h"
    assert "   40 Violin: 1" in text and "   71 Clarinet: 1" in text


def test_a_summary_names_damaged_audio(tmp_path: pathlib.Path) -> None:
    song = make_song(tmp_path / "test" / "Track01876")
    (song / "mix.flac").write_bytes(b"no audio")
    with pytest.raises(DatasetError, match=r"mix\.flac: .*; or get slakh again"):
        summarize(slakh.find(tmp_path, "test"))


@pytest.mark.parametrize(
    "bad",
    [
        Note(1.0, 1.0, 60, 100),
        Note(-0.5, 1.0, 60, 100),
        Note(0.0, 1.0, 128, 100),
        Note(0.0, 1.0, 60, 100, 128),
        Note(float("nan"), 1.0, 60, 100),
    ],
)
def test_notes_that_cannot_be_are_left_out_and_all_of_them_are_damage(
    bad: Note, caplog: pytest.LogCaptureFixture
) -> None:
    good, found = Note(0.0, 1.0, 60, 100), [bad]

    def read(label: Label) -> list[Note]:
        return found

    example = Example("x", "set", "train", (), (Label(pathlib.Path("x.csv")),), read)
    with pytest.raises(DatasetError, match=r"x\.csv: damaged label file .*; get set again"):
        example.load_notes()
    found.append(good)
    assert example.load_notes() == [good]
    assert "x.csv: 1 of its 2 notes cannot be and are left out" in caplog.text


def test_one_damaged_piece_is_left_out_of_each_data_set(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "slakh"
    for number in (1876, 1877):
        song = make_song(root / "test" / f"Track0{number}")
    (song / "metadata.yaml").write_text("stems: 3")
    for module in (slakh, cerberus4):
        assert {e.id.split("-")[0] for e in module.find(root, "test")} == {"Track01876"}
    write_guitarset(tmp_path, ["00_BN1-129-Eb_comp"])
    for odd in ("._00_BN1-129-Eb_comp.jams", "mine.jams"):
        touch(tmp_path / "annotation" / odd)
    assert len(guitarset.find(tmp_path, "train")) == 2
    write_urmp(tmp_path, "03_Dance_fl_cl")
    write_urmp(tmp_path, "04_Allegro_fl_kazoo")
    assert [example.id for example in urmp.find(tmp_path, "train")] == ["03_Dance_fl_cl"]
    rows = maestro_rows({"train": 2})
    write_maestro(tmp_path, "maestro-v3.0.0.json", rows)
    del rows[1]["duration"]
    (tmp_path / "maestro-v2.0.0.json").write_text(json.dumps(rows))
    (tmp_path / "maestro-v3.0.0.json").unlink()
    assert len(maestro.find(tmp_path, "train")) == 1
    assert [text.count("left out") for text in caplog.messages] == [1] * 5


# --- MAESTRO ------------------------------------------------------------------------------------

OFFICIAL_MAESTRO_V3 = {"train": 962, "validation": 137, "test": 177}


def maestro_rows(counts: dict[str, int]) -> list[dict[str, Any]]:
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [
        {
            "canonical_composer": "Anon, with a comma",
            "canonical_title": "Étude",
            "split": split,
            "year": 2018,
            "midi_filename": f"2018/{i:04d}.midi",
            "audio_filename": f"2018/{i:04d}.wav",
            "duration": 1.5,
        }
        for i, split in enumerate(splits)
    ]


def write_maestro(root: pathlib.Path, name: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        touch(root / row["midi_filename"])
        touch(root / row["audio_filename"])
    path = root / name
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif "v3" in name:
        columns = {key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]}
        path.write_text(json.dumps(columns))
    else:
        path.write_text(json.dumps(rows))


def test_maestro_reads_its_slice_with_the_pedal(slices: pathlib.Path) -> None:
    (example,) = maestro.find(slices / "maestro", "train")
    notes = example.load_notes()
    assert notes == read_midi(example.labels[0].path)
    assert {(n.program, n.is_drum) for n in notes} == {(0, False)}
    dry = read_midi(example.labels[0].path, sustain=False)
    assert sum(n.offset - n.onset for n in notes) > 1.1 * sum(n.offset - n.onset for n in dry)
    assert example.duration == 698.661160312


@pytest.mark.parametrize("name", ["maestro-v3.0.0.csv", "maestro-v3.0.0.json"])
def test_maestro_splits_are_those_of_its_metadata(name: str, tmp_path: pathlib.Path) -> None:
    write_maestro(tmp_path, name, maestro_rows(OFFICIAL_MAESTRO_V3))
    found = {split: maestro.find(tmp_path, split) for split in maestro.SPLITS}
    assert {split: len(examples) for split, examples in found.items()} == OFFICIAL_MAESTRO_V3
    ids = [example.id for examples in found.values() for example in examples]
    assert ids == sorted(ids) and len(set(ids)) == 1276


def test_maestro_metadata_reads_alike_in_all_its_forms(tmp_path: pathlib.Path) -> None:
    names = ("maestro-v1.0.0.csv", "maestro-v1.0.0.json", "maestro-v3.0.0.json")
    found = []
    for name in names:
        write_maestro(tmp_path, name, maestro_rows({"train": 3, "test": 2}))
        found.append(maestro.find(tmp_path, "train"))
        (tmp_path / name).unlink()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "name, content",
    [
        ("maestro-v3.0.0.json", '{"split": {"0": "tr'),
        ("maestro-v3.0.0.json", '{"split": {"0": "train"}}'),
        ("maestro-v3.0.0.json", "3"),
        ("maestro-v3.0.0.csv", "split,midi_filename,audio_filename,duration\ntrain,a.midi,a.wav"),
        ("maestro-v3.0.0.csv", ""),
        ("maestro-v3.0.0.csv", "\0\0\0"),
    ],
)
def test_damaged_maestro_metadata_is_named(name: str, content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=name):
        maestro.find(tmp_path, "train")


def test_missing_files_are_named_or_skipped_on_request(tmp_path: pathlib.Path) -> None:
    write_maestro(tmp_path, "maestro-v3.0.0.csv", maestro_rows({"train": 3}))
    (tmp_path / "2018" / "0001.wav").unlink()
    (tmp_path / "2018" / "0002.midi").unlink()
    with pytest.raises(DatasetError, match=r"0001\.wav: no such file and 1 other.*skip_missing"):
        maestro.find(tmp_path, "train")
    assert [e.id for e in maestro.find(tmp_path, "train", skip_missing=True)] == ["2018/0000"]


def test_damaged_midi_is_named_and_so_is_midi_without_notes(tmp_path: pathlib.Path) -> None:
    write_maestro(tmp_path, "maestro-v3.0.0.csv", maestro_rows({"train": 1}))
    (example,) = maestro.find(tmp_path, "train")
    path = example.labels[0].path
    with pytest.raises(DatasetError, match=r"0000\.midi: damaged label file .*get maestro again"):
        example.load_notes()
    write_part(path, [Note(0.0, 1.0, 60, 100)])
    whole = path.read_bytes()
    assert example.load_notes() == [Note(0.0, 1.0, 60, 100)]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"0000\.midi: damaged label file"):
        example.load_notes()
    write_part(path, [])
    with pytest.raises(DatasetError, match=r"0000\.midi: no notes"):
        example.load_notes()
    path.unlink()
    with pytest.raises(DatasetError, match=r"0000\.midi: .*get maestro again"):
        example.load_notes()


# --- GuitarSet ----------------------------------------------------------------------------------


def guitarset_names() -> list[str]:
    excerpts = [
        f"{style}{progression}-{tempo}-{key}"
        for style in ("BN", "Funk", "Jazz", "Rock", "SS")
        for progression in (1, 2, 3)
        for tempo, key in ((129, "Eb"), (114, "F#"))
    ]
    return [
        f"{player:02d}_{excerpt}_{mode}"
        for player, excerpt, mode in itertools.product(range(6), excerpts, ("comp", "solo"))
    ]


def write_guitarset(root: pathlib.Path, names: list[str]) -> None:
    for name in names:
        touch(root / "annotation" / f"{name}.jams")
        touch(root / "audio_mono-mic" / f"{name}_mic.wav")
        touch(root / "audio_mono-pickup_mix" / f"{name}_mix.wav")


def test_guitarset_reads_its_slice_as_the_reference_midi_has_it(
    shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    root = shared / "data" / "slices" / "guitarset"
    (example,) = guitarset.find(root, "train", audio="mic", skip_missing=True)
    notes = example.load_notes()
    reference = read_midi(shared / f"data/dev/midi/real_guitar_guitarset_{example.id[:-4]}.mid")
    write_midi(notes, tmp_path / "notes.mid")  # MIDI cannot hold one pitch on two strings at once
    kept = read_midi(tmp_path / "notes.mid")
    assert [n.pitch for n in kept] == [n.pitch for n in notes] == [n.pitch for n in reference]
    times = [[(n.onset, n.offset) for n in part] for part in (kept, reference)]
    np.testing.assert_allclose(times[0], times[1], atol=2e-3)
    assert {n.program for n in notes} == {24}


def test_every_guitarset_annotation_of_the_slice_reads(slices: pathlib.Path) -> None:
    counts = {}
    for path in sorted((slices / "guitarset" / "annotation").glob("*.jams")):
        notes = guitarset.read_notes(Label(path, 24))
        check_notes(notes)
        counts[path.stem] = len(notes)
    assert list(counts.values()) == [71, 151, 6]


@pytest.mark.parametrize("audio, versions", [("mic", 1), ("mix", 1), ("both", 2)])
def test_guitarset_holds_every_third_progression_out(
    audio: str, versions: int, tmp_path: pathlib.Path
) -> None:
    write_guitarset(tmp_path, guitarset_names())
    train = guitarset.find(tmp_path, "train", audio=audio)
    validation = guitarset.find(tmp_path, "validation", audio=audio)
    assert (len(train), len(validation)) == (240 * versions, 120 * versions)
    assert {e.id.split("-")[0][-1] for e in validation} == {"3"}
    assert {e.id.split("-")[0][-1] for e in train} == {"1", "2"}
    assert all(e.audio[0].stem == e.id for e in (*train, *validation))


def test_guitarset_names_what_is_odd(tmp_path: pathlib.Path) -> None:
    name = "00_BN1-129-Eb_comp"
    write_guitarset(tmp_path, [name])
    with pytest.raises(ValueError, match="audio must be mic, mix or both: got 'hex'"):
        guitarset.find(tmp_path, "train", audio="hex")
    (tmp_path / "audio_mono-pickup_mix" / f"{name}_mix.wav").unlink()
    assert len(guitarset.find(tmp_path, "train", audio="mic")) == 1
    with pytest.raises(DatasetError, match=r"Eb_comp_mix\.wav: no such file; get"):
        guitarset.find(tmp_path, "train")
    touch(tmp_path / "annotation" / "notes.jams")
    (tmp_path / "annotation" / f"{name}.jams").unlink()
    with pytest.raises(DatasetError, match=r"notes\.jams: not named like"):
        guitarset.find(tmp_path, "train", audio="mic")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"annotations": [{"namespace": "note_mi',
        '{"annotations": [{"namespace": "note_midi"}]}',
        '{"annotations": [{"namespace": "note_midi", "data": [{"time": 1.0, "duration": 1.0}]}]}',
        '{"annotations": [{"namespace": "note_midi", "data": '
        '[{"time": 1.0, "duration": 1.0, "value": Infinity}]}]}',
        "[]",
    ],
)
def test_damaged_jams_are_named(content: str, tmp_path: pathlib.Path) -> None:
    write_guitarset(tmp_path, ["00_BN1-129-Eb_comp"])
    (example,) = guitarset.find(tmp_path, "train", audio="mic")
    example.labels[0].path.write_text(content)
    with pytest.raises(DatasetError, match=r"comp\.jams: damaged label file .*get guitarset again"):
        example.load_notes()


# --- MusicNet -----------------------------------------------------------------------------------

PROGRAMS_OF_ENSEMBLE = {
    "Solo Piano": {0},
    "Solo Violin": {40},
    "Solo Cello": {42},
    "String Quartet": {40, 41, 42},
    "Accompanied Violin": {0, 40},
    "Pairs Clarinet-Horn-Bassoon": {60, 70, 71},
}


def test_musicnet_programs_fit_the_ensembles_of_its_metadata(slices: pathlib.Path) -> None:
    with (slices / "musicnet" / "musicnet_metadata.csv").open(encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    labels = sorted((slices / "musicnet" / "test_labels").glob("*.csv"))
    assert len(labels) == 10
    for path in labels:
        notes = musicnet.read_notes(Label(path))
        check_notes(notes)
        assert {n.program for n in notes} == PROGRAMS_OF_ENSEMBLE[rows[path.stem]["ensemble"]]
        assert 0.8 < max(n.offset for n in notes) / float(rows[path.stem]["seconds"]) < 1.01


def test_musicnet_times_are_samples_at_44_1_khz(slices: pathlib.Path) -> None:
    first, second = musicnet.find(slices / "musicnet_rendered_fixture", "train")
    assert (first.id, second.id) == ("1819", "2106")
    notes = second.load_notes()
    assert notes[0] == Note(0.5, 24098 / 44100, 61, 100, 40)
    assert all(n.onset < soundfile.info(second.audio[0]).duration for n in notes)


def write_musicnet(root: pathlib.Path, ids: list[str]) -> None:
    for i, piece in enumerate(ids):
        part = "test" if i % 33 == 0 else "train"
        touch(root / f"{part}_data" / f"{piece}.wav")
        touch(root / f"{part}_labels" / f"{piece}.csv")
        touch(root / "musicnet_em" / f"{piece}.mid")


def test_musicnet_splits_are_fixed_lists_and_the_rest(
    slices: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with (slices / "musicnet" / "musicnet_metadata.csv").open(encoding="utf-8") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    write_musicnet(tmp_path, ids)
    for labels in ("csv", "em"):
        found = {
            split: [e.id for e in musicnet.find(tmp_path, split, labels=labels)]
            for split in musicnet.SPLITS
        }
        assert [len(found[split]) for split in musicnet.SPLITS] == [300, 15, 15]
        assert sorted(itertools.chain(*found.values())) == sorted(ids)
        assert found["validation"] == list(musicnet.VALIDATION_IDS)
        assert found["test"] == list(musicnet.TEST_IDS)
    for piece in ("2194", "2211", "2227", "2230", "2292", "2305", "2310"):
        (tmp_path / "musicnet_em" / f"{piece}.mid").unlink()
    assert len(musicnet.find(tmp_path, "train", labels="em")) == 293


def test_musicnet_names_missing_pieces(tmp_path: pathlib.Path) -> None:
    write_musicnet(tmp_path, ["2151", *musicnet.TEST_IDS[1:]])
    with pytest.raises(DatasetError, match=r"train_data/1729\.wav: no such file and 1 other"):
        musicnet.find(tmp_path, "test")
    assert len(musicnet.find(tmp_path, "test", skip_missing=True)) == 14
    with pytest.raises(DatasetError, match="no complete example"):
        musicnet.find(tmp_path, "validation", skip_missing=True)
    with pytest.raises(ValueError, match="labels must be csv or em: got 'tsv'"):
        musicnet.find(tmp_path, "train", labels="tsv")


def test_musicnet_em_reads_midi_programs_as_they_are(tmp_path: pathlib.Path) -> None:
    write_musicnet(tmp_path, ["2151"])
    path = tmp_path / "musicnet_em" / "2151.mid"
    midi = pretty_midi.PrettyMIDI(resolution=500)
    midi.instruments.append(pretty_midi.Instrument(program=40))
    midi.instruments[0].notes.append(pretty_midi.Note(70, 60, 1.0, 2.0))
    midi.write(str(path))
    (example,) = musicnet.find(tmp_path, "train", labels="em")
    assert example.dataset == "musicnet_em"
    assert example.load_notes() == [Note(1.0, 2.0, 60, 70, 40)]


@pytest.mark.parametrize(
    "content",
    [
        "start_time,end_time,instrument,note\n9694,11742,41",
        "start_time,end_time,instrument,note\n9694,1174x,41,61",
        "start_time,end_time,instrument,note\n9694,9694,41,61",
        "start_time,end_time,instrument,note\n9694,11742,0,61",
        "start_time,end_time,note\n9694,11742,61",
        b"start_time,end_time,instrument,note\n\xff\xfe,1,1,1",
    ],
)
def test_damaged_musicnet_labels_are_named(content: str | bytes, tmp_path: pathlib.Path) -> None:
    write_musicnet(tmp_path, ["2151"])
    (example,) = musicnet.find(tmp_path, "train")
    data = content if isinstance(content, bytes) else content.encode()
    example.labels[0].path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"2151\.csv: damaged label file .*get musicnet again"):
        example.load_notes()
    example.labels[0].path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"2151\.csv: no notes"):
        example.load_notes()


# --- URMP ---------------------------------------------------------------------------------------


def write_urmp(root: pathlib.Path, name: str) -> pathlib.Path:
    folder = root / name
    number, title, *codes = name.split("_")
    write_audio(folder / f"AuMix_{name}.wav")
    for part, code in enumerate(codes, start=1):
        path = folder / f"Notes_{part}_{code}_{number}_{title}.txt"
        path.write_text(f"0.50\t{440.0 * part * 1.01:.3f}\t0.25\n1.0 261.63 1.5\n\n")
    return folder


def test_urmp_merges_its_parts(tmp_path: pathlib.Path) -> None:
    write_urmp(tmp_path / "Dataset", "03_Dance_fl_cl")
    (example,) = urmp.find(tmp_path, "train")
    assert example.id == "03_Dance_fl_cl"
    assert [path.name for path in example.audio] == ["AuMix_03_Dance_fl_cl.wav"]
    assert example.load_notes() == [
        Note(0.5, 0.75, 81, 100, 71),
        Note(0.5, 0.75, 69, 100, 73),
        Note(1.0, 2.5, 60, 100, 71),
        Note(1.0, 2.5, 60, 100, 73),
    ]


def test_urmp_splits_35_pieces_from_9(tmp_path: pathlib.Path) -> None:
    for number in range(1, 45):
        write_urmp(tmp_path, f"{number:02d}_Piece_vn_vc")
    (tmp_path / "Supplementary_Files").mkdir()
    train, validation = (urmp.find(tmp_path, split) for split in urmp.SPLITS)
    assert [int(e.id[:2]) for e in validation] == [1, 2, 12, 13, 24, 25, 31, 38, 39]
    assert len(train) == 35
    assert {int(e.id[:2]) for e in (*train, *validation)} == set(range(1, 45))


def test_urmp_trusts_the_folder_for_the_instrument(tmp_path: pathlib.Path) -> None:
    folder = write_urmp(tmp_path, "15_Surprise_tpt_tpt_tbn")
    (folder / "Notes_3_tbn_15_Surprise.txt").rename(folder / "Notes_3_tpt_15_Surprise.txt")
    (example,) = urmp.find(tmp_path, "train")
    assert [label.program for label in example.labels] == [56, 56, 57]


def test_urmp_names_what_is_missing_or_unknown(tmp_path: pathlib.Path) -> None:
    folder = write_urmp(tmp_path, "03_Dance_fl_cl")
    (folder / "Notes_2_cl_03_Dance.txt").unlink()
    with pytest.raises(DatasetError, match=r"Notes_2_cl_03_Dance\.txt: no such file; get"):
        urmp.find(tmp_path, "train")
    (folder / "AuMix_03_Dance_fl_cl.wav").unlink()
    with pytest.raises(DatasetError, match=r"AuMix_03_Dance_fl_cl\.wav: no such file and 1 other"):
        urmp.find(tmp_path, "train")
    odd = write_urmp(tmp_path / "other", "04_Allegro_fl_kazoo").parent
    with pytest.raises(DatasetError, match="unknown instrument 'kazoo'; rename it to one of vn"):
        urmp.find(odd, "train")


@pytest.mark.parametrize("line", ["0.5 440.0", "0.5 0.0 1.0", "0.5 A4 1.0", "0.5 440 0", "1 inf 1"])
def test_damaged_urmp_notes_are_named(line: str, tmp_path: pathlib.Path) -> None:
    folder = write_urmp(tmp_path, "03_Dance_fl_cl")
    (folder / "Notes_1_fl_03_Dance.txt").write_text(f"{line}\n")
    (example,) = urmp.find(tmp_path, "train")
    with pytest.raises(DatasetError, match=r"Notes_1_fl_03_Dance\.txt: damaged label file"):
        example.load_notes()


# --- Slakh2100 ----------------------------------------------------------------------------------

BAND = (  # family, program_num, pitch of its notes
    ("Bass", 35, 47),
    ("Drums", 128, 38),
    ("Guitar", 26, 60),
    ("Guitar", 30, 62),
    ("Piano", 1, 64),
    ("Strings (continued)", 49, 67),
)


def make_song(
    folder: pathlib.Path, band: tuple[tuple[str, int, int], ...] = BAND, seconds: float = 1.0
) -> pathlib.Path:
    """Writes a song in Slakh's layout, with an unrendered stem at the end."""
    stems = {}
    for i, (family, program, pitch) in enumerate((*band, ("Sound Effects", 103, 60))):
        name, is_drum = f"S{i:02d}", family == "Drums"
        rendered = family != "Sound Effects"
        stems[name] = {
            "audio_rendered": rendered,
            "inst_class": family,
            "is_drum": is_drum,
            "midi_saved": rendered,
            "program_num": program,
        }
        if rendered:
            write_audio(folder / "stems" / f"{name}.flac", seconds)
            notes = [Note(0.5 + i / 10, 1.5, pitch, 90), Note(2.0, 2.5, pitch, 80)]
            write_part(folder / "MIDI" / f"{name}.mid", notes, is_drum=is_drum)
    write_audio(folder / "mix.flac", seconds)
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"stems": stems, "UUID": "x"}))
    return folder


def test_slakh_has_mt3s_34_classes_of_programs() -> None:
    programs = [program for program, _ in slakh.CLASSES.values()]
    members = [member for _, group in slakh.CLASSES.values() for member in group]
    assert len(programs) == len(set(programs)) == 34 and programs == sorted(programs)
    assert len(members) == len(set(members))
    assert all(program in group for program, group in slakh.CLASSES.values())
    assert sorted(set(range(96)) - set(members)) == [38, 39, 62, 63]  # synth bass, synth brass


def test_slakh_labels_are_the_stems_own_midi_files(slices: pathlib.Path) -> None:
    root = slices / "slakh" / "slakh2100_flac_redux"
    (whole,) = slakh.find(root, "train", num_mixes=0)
    assert whole.audio == (root / "train" / "Track00001" / "mix.flac",)
    # Distortion guitar, drums, bright piano, finger bass, choir, organ, jazz guitar, ...
    assert [label.program for label in whole.labels] == [29, 0, 0, 33, 52, 16, 26, 29, 16, 16]
    assert [label.path.stem for label in whole.labels if label.is_drum] == ["S01"]
    parts = [slakh.read_notes(label) for label in whole.labels]
    for label, part in zip(whole.labels, parts, strict=True):
        (own,) = read_instruments(label.path)
        assert [n.pitch for n in sort_notes(part)] == [n.pitch for n in sort_notes(own.notes)]
    assert whole.load_notes() == trim_overlaps(itertools.chain(*parts))
    bass = min(n.pitch for n in whole.load_notes() if n.program == 33)
    source = read_instruments(root / "train" / "Track00001" / "all_src.mid")
    assert (bass, min(n.pitch for p in source if p.program == 33 for n in p.notes)) == (47, 26)


def test_slakh_reads_every_form_of_its_slices(slices: pathlib.Path) -> None:
    redux, baby = slices / "slakh" / "slakh2100_flac_redux", slices / "slakh" / "babyslakh_16k"
    from_redux = slakh.find(redux, "train")
    from_baby = slakh.find(baby, "train", skip_missing=True)  # Track00007 has no metadata
    assert [e.id for e in from_redux] == [e.id for e in from_baby]
    assert len(from_redux) == 10
    for a, b in zip(from_redux, from_baby, strict=True):
        assert [p.stem for p in a.audio] == [p.stem for p in b.audio]
        assert a.load_notes() == b.load_notes()
    with pytest.raises(DatasetError, match=r"Track00007/metadata\.yaml: no such file"):
        slakh.find(baby, "train")
    for split in ("validation", "test"):
        with pytest.raises(DatasetError, match=r"mix\.flac: no such file and \d+ other files"):
            slakh.find(redux, split)
    for split, number, stems in (("validation", 1501, 10), ("test", 1876, 13), ("omitted", 49, 7)):
        assert len(slakh.read_stems(redux / split / f"Track{number:05d}")) == stems


def test_slakh_songs_without_split_folders_are_split_by_number(tmp_path: pathlib.Path) -> None:
    for number in (1, 1500, 1501, 1875, 1876, 2100):
        touch(tmp_path / f"Track{number:05d}" / "metadata.yaml")
    found = [[int(s.name[5:]) for s in slakh.find_songs(tmp_path, sp)] for sp in slakh.SPLITS]
    assert found == [[1, 1500], [1501, 1875], [1876, 2100]]


def test_slakh_mixes_are_random_yet_the_same_each_time(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "train" / "Track00001")
    alone = slakh.find(tmp_path, "train", seed=3)
    make_song(tmp_path / "train" / "Track00000")
    make_song(tmp_path / "train" / "Track00002", BAND[:3])
    (tmp_path / "omitted" / "Track00003").mkdir(parents=True)
    found = slakh.find(tmp_path, "train", seed=3)
    assert [e.id for e in found] == [f"Track0000{t}-{i:02d}" for t in (0, 1) for i in range(10)]
    assert found[10:] == alone
    assert found != slakh.find(tmp_path, "train", seed=4)
    assert {len(e.audio) for e in found} == {4, 5, 6}
    assert len({e.audio for e in found}) > 10
    for example in found:
        assert [p.stem for p in example.audio] == [label.path.stem for label in example.labels]
        assert example.instruments() == {(n.program, n.is_drum) for n in example.load_notes()}


def test_slakh_trims_overlaps_in_training_only(tmp_path: pathlib.Path) -> None:
    guitars = (("Guitar", 29, 60), ("Guitar", 30, 60))  # one class, one pitch
    make_song(tmp_path / "train" / "Track00001", guitars)
    make_song(tmp_path / "test" / "Track01876", guitars)
    (trained,) = slakh.find(tmp_path, "train", num_mixes=0)
    (judged,) = slakh.find(tmp_path, "test")
    spans = [[(n.onset, n.offset) for n in e.load_notes()] for e in (trained, judged)]
    assert spans == [
        [(0.5, 0.6), (0.6, 1.5), (2.0, 2.5)],
        [(0.5, 1.5), (0.6, 1.5), (2.0, 2.5), (2.0, 2.5)],
    ]
    untrimmed = dataclasses.replace(trained, trim=False).load_notes()
    assert trained.load_notes() == trim_overlaps(untrimmed)


def test_slakh_holds_notes_with_the_pedal_of_their_own_stem(tmp_path: pathlib.Path) -> None:
    song = make_song(tmp_path / "test" / "Track01876")
    note = Note(0.5, 1.0, 64, 90)
    write_part(song / "MIDI" / "S04.mid", [note], pedal=((0.0, 127), (2.0, 0)))
    write_part(song / "MIDI" / "S05.mid", [note])
    (example,) = slakh.find(tmp_path, "test")
    offsets = {n.program: n.offset for n in example.load_notes() if n.pitch == 64}
    assert offsets == {0: 2.0, 48: 1.0}


def test_slakh_bass_can_be_had_as_it_sounds(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "test" / "Track01876")
    written, sounding = (
        slakh.find(tmp_path, "test", bass=bass)[0].load_notes() for bass in ("written", "sounding")
    )
    assert (
        sort_notes(n._replace(pitch=n.pitch - 12) if n.program == 33 else n for n in written)
        == sounding
    )
    with pytest.raises(ValueError, match="bass must be written or sounding: got 'low'"):
        slakh.find(tmp_path, "test", bass="low")
    with pytest.raises(ValueError, match="num_mixes must not be negative: got -1"):
        slakh.find(tmp_path, "test", num_mixes=-1)


def test_slakh_refuses_an_unknown_instrument_that_sounds(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "test" / "Track01876", (*BAND, ("Ethnic", 104, 60)))
    with pytest.raises(DatasetError, match=r"metadata\.yaml: stem S06 has unknown .*Ethnic.*104"):
        slakh.find(tmp_path, "test")


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_text("stems: [1, 2"),
        lambda path: path.write_text("stems:\n  S00: 3\n"),
        lambda path: path.write_text(""),
        lambda path: path.write_text("!!python/object/apply:os.getcwd []"),
        lambda path: path.write_bytes(b"\xff\x00\x01"),
    ],
)
@pytest.mark.parametrize("module", [slakh, cerberus4], ids=lambda m: m.NAME)
def test_damaged_slakh_metadata_is_named(
    module: Any, damage: Callable[[pathlib.Path], Any], tmp_path: pathlib.Path
) -> None:
    song = make_song(tmp_path / "test" / "Track01876")
    damage(song / "metadata.yaml")
    with pytest.raises(DatasetError, match=r"metadata\.yaml: damaged metadata") as caught:
        module.find(tmp_path, "test")
    assert "\n" not in str(caught.value)


def test_missing_slakh_stems_are_named(tmp_path: pathlib.Path) -> None:
    song = make_song(tmp_path / "train" / "Track00001")
    (song / "stems" / "S01.flac").unlink()
    with pytest.raises(DatasetError, match=r"stems/S01\.flac: no such file"):
        slakh.find(tmp_path, "train")
    make_song(tmp_path / "train" / "Track00001")
    (song / "MIDI" / "S04.mid").write_bytes(b"MThd")
    (example,) = slakh.find(tmp_path, "train", num_mixes=0)
    with pytest.raises(DatasetError, match=r"MIDI/S04\.mid: damaged label file .*slakh again"):
        example.load_notes()


# --- Cerberus4 ----------------------------------------------------------------------------------


def test_cerberus4_takes_every_quartet_of_a_song(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "train" / "Track00001", (*BAND, ("Piano", 5, 70)))
    make_song(tmp_path / "train" / "Track00002", BAND[1:])  # no bass
    found = cerberus4.find(tmp_path, "train")
    assert [e.id for e in found] == [
        f"Track00001-S00-S01-{guitar}-{piano}"
        for guitar, piano in itertools.product(("S02", "S03"), ("S04", "S06"))
    ]
    for example in found:
        assert [(x.program, x.is_drum) for x in example.labels] == [
            (32, False),
            (0, True),
            (24, False),
            (0, False),
        ]
        assert [p.stem for p in example.audio] == example.id.split("-")[1:]
        assert len(example.load_notes()) == 8


def test_cerberus4_reads_the_slakh_slice(slices: pathlib.Path) -> None:
    found = cerberus4.find(slices / "slakh" / "slakh2100_flac_redux", "train")
    guitars = [e.id.split("-")[3] for e in found]
    assert guitars == ["S00", "S07", "S08"]
    notes = found[0].load_notes()
    assert {(n.program, n.is_drum) for n in notes} == {
        (32, False),
        (0, True),
        (24, False),
        (0, False),
    }
    assert notes == trim_overlaps(notes)


def test_cerberus4_bass_can_be_had_as_it_sounds(tmp_path: pathlib.Path) -> None:
    make_song(tmp_path / "test" / "Track01876")
    lowest = [
        min(n.pitch for n in cerberus4.find(tmp_path, "test", bass=bass)[0].load_notes())
        for bass in ("written", "sounding")
    ]
    assert lowest == [38, 35]  # the drums' and the bass's
