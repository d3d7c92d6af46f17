"""Beats: found in notes, written to MIDI files and read again; and how their network is trained."""

from __future__ import annotations

import itertools

import mido
import numpy as np
import pretty_midi
import pytest

from mt3_keras import beat_tracker
from mt3_keras.beat_tracker import beat_logits, note_features, to_array, track_beats
from mt3_keras.beats import Beats
from mt3_keras.midi import read_midi, write_midi
from mt3_keras.notes import Note
from mt3_keras.tempo import MAX_DEVIATION, read_beats
from train import beats as training


def steady(bpm, per_bar, num_beats, start=0.0, **options):
    times = tuple(start + k * 60 / bpm for k in range(num_beats))
    return Beats(times, tuple(k % per_bar + 1 for k in range(num_beats)), **options)


def unsteady(seed, per_bar=4):
    """Beats that no two tempos are alike in, with a pickup."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0, 2) + np.cumsum(rng.uniform(0.25, 1.2, 60))
    return Beats(tuple(times.tolist()), tuple((k + 2) % per_bar + 1 for k in range(60)))


def band(bpm, per_bar, num_bars, seed=0):
    """Drums, bass and chords in plain bars, each note some milliseconds off."""
    rng = np.random.default_rng(seed)
    beat = 60 / bpm
    notes = []

    def add(position, length, pitch, program=0, is_drum=False):
        onset = 0.4 + position * beat + rng.normal(0, 0.004)
        notes.append(Note(onset, onset + length * beat, pitch, 90, program, is_drum))

    for bar in range(num_bars):
        root = 36 + (0, 9, 5, 7)[bar % 4]
        for number in range(per_bar):
            first = bar * per_bar + number
            add(
                first, 0.1, 38 if number % 2 and per_bar == 4 else 36 if not number else 42, 0, True
            )
            add(first, 0.1, 42, 0, True)
            add(first + 0.5, 0.1, 42, 0, True)
        add(bar * per_bar, per_bar - 0.2, root, 33)
        for interval in (12, 16, 19):
            add(bar * per_bar, per_bar - 0.2, root + interval)
    return sorted(notes)


# --- in MIDI files ---


@pytest.mark.parametrize("beats", [None, steady(97.3, 3, 90, 0.31), *map(unsteady, range(6))])
def test_notes_keep_their_times_within_a_tick_whatever_the_beats(tmp_path, beats):
    rng = np.random.default_rng(1)
    onsets = np.sort(rng.uniform(0, 80, 400))
    notes = [Note(t, t + rng.uniform(0.1, 3), 20 + k % 100, 80) for k, t in enumerate(onsets)]
    write_midi(notes, tmp_path / "a.mid", beats=beats)
    read = pretty_midi.PrettyMIDI(str(tmp_path / "a.mid"))
    (part,) = read.instruments
    got = sorted((n.pitch, n.start, n.end) for n in part.notes)
    for (pitch, start, end), note in zip(
        got, sorted(notes, key=lambda n: (n.pitch, n.onset)), strict=True
    ):
        assert pitch == note.pitch
        for time, expected in ((start, note.onset), (end, note.offset)):
            tick = round(read.time_to_tick(expected))
            length = max(read.tick_to_time(tick + 1) - read.tick_to_time(tick), 1e-6)
            assert abs(time - expected) <= length


@pytest.mark.parametrize(
    "beats", [steady(120, 4, 64), steady(71, 3, 40, 1.9), *map(unsteady, range(6))]
)
def test_beats_and_bar_lines_of_a_file_are_those_it_was_written_with(tmp_path, beats):
    write_midi([Note(0.5, beats.times[-1] + 5, 60, 80)], tmp_path / "a.mid", beats=beats)
    read = read_beats(tmp_path / "a.mid")
    for wanted, got in ((beats.times, read.times), (beats.downbeats, read.downbeats)):
        for time in wanted:
            assert np.abs(np.array(got) - time).min() <= MAX_DEVIATION + 1e-3
    assert read.beats_per_bar == beats.beats_per_bar


def test_beats_are_read_as_pretty_midi_reads_them(tmp_path):
    write_midi([Note(0.5, 70.0, 60, 80)], tmp_path / "a.mid", beats=unsteady(3))
    read, other = read_beats(tmp_path / "a.mid"), pretty_midi.PrettyMIDI(str(tmp_path / "a.mid"))
    num = min(len(read.times), len(other.get_beats()))
    np.testing.assert_allclose(read.times[:num], other.get_beats()[:num], atol=1e-6)
    bars = other.get_downbeats()
    np.testing.assert_allclose(read.downbeats[: len(bars)], bars[: len(read.downbeats)], atol=1e-6)


def test_a_steady_tempo_is_one_tempo(tmp_path):
    rng = np.random.default_rng(0)
    beats = steady(126, 4, 200)
    late = tuple(time + abs(rng.normal(0, 0.004)) for time in beats.times)
    write_midi([Note(0.0, 90.0, 60, 80)], tmp_path / "a.mid", beats=Beats(late, beats.numbers))
    _, tempos = pretty_midi.PrettyMIDI(str(tmp_path / "a.mid")).get_tempo_changes()
    assert len(tempos) == 1
    assert tempos[0] == pytest.approx(126, abs=0.1)


def test_beats_of_three_eighths_are_dotted_quarters(tmp_path):
    beats = steady(60, 2, 20, is_compound=True)
    write_midi([Note(0.0, 20.0, 60, 80)], tmp_path / "a.mid", beats=beats)
    read = pretty_midi.PrettyMIDI(str(tmp_path / "a.mid"))
    (signature,) = read.time_signature_changes
    assert (signature.numerator, signature.denominator) == (6, 8)
    again = read_beats(tmp_path / "a.mid")
    assert again.is_compound
    np.testing.assert_allclose(again.times[:20], beats.times, atol=1e-3)


def test_without_beats_no_metre_is_stated(tmp_path):
    write_midi([Note(0.0, 9.0, 60, 80)], tmp_path / "a.mid")
    kinds = {
        message.type for track in mido.MidiFile(tmp_path / "a.mid").tracks for message in track
    }
    assert "time_signature" not in kinds
    assert not read_beats(tmp_path / "a.mid").has_bars


def test_a_text_event_says_what_wrote_the_file(tmp_path):
    write_midi([Note(0.0, 9.0, 60, 80)], tmp_path / "a.mid", text="mt3-keras, model small")
    first = mido.MidiFile(tmp_path / "a.mid").tracks[0][0]
    assert (first.type, first.text) == ("text", "mt3-keras, model small")


def test_film_time_has_no_beats(tmp_path):
    write_midi([Note(0.0, 9.0, 60, 80)], tmp_path / "a.mid")
    content = bytearray((tmp_path / "a.mid").read_bytes())
    content[12:14] = bytes([256 - 25, 40])
    (tmp_path / "a.mid").write_bytes(content)
    assert read_beats(tmp_path / "a.mid") is None


@pytest.mark.parametrize("times", [(), (1.0,), (1.0, 1.0), (2.0, 1.0)])
def test_beats_that_do_not_advance_are_refused(times):
    with pytest.raises(ValueError, match="beats"):
        Beats(times, (0,) * len(times))


def test_positions_count_beats_with_fractions_and_go_on_at_both_ends():
    beats = Beats((1.0, 2.0, 4.0), (1, 2, 3))
    assert beats.positions([0.5, 1.0, 1.25, 3.0, 6.0]).tolist() == [-0.5, 0.0, 0.25, 1.5, 3.0]


# --- found in notes ---


@pytest.mark.parametrize(("bpm", "per_bar"), [(92, 4), (118, 4), (140, 3), (106, 3)])
def test_beats_and_bars_of_a_plain_band_are_found(bpm, per_bar):
    found = track_beats(band(bpm, per_bar, 14))
    assert found.beats_per_minute == pytest.approx(bpm, rel=0.01)
    assert found.beats_per_bar == per_bar
    expected = [0.4 + bar * per_bar * 60 / bpm for bar in range(1, 12)]
    for time in expected:
        assert np.abs(np.array(found.downbeats) - time).min() < 0.03


def test_long_pieces_are_read_in_parts_that_join(monkeypatch):
    notes = band(112, 4, 40)
    whole = track_beats(notes)
    monkeypatch.setattr(beat_tracker, "WINDOW_SECONDS", 20)
    monkeypatch.setattr(beat_tracker, "MARGIN_SECONDS", 15)
    in_parts = track_beats(notes)
    assert len(in_parts.times) == len(whole.times)
    np.testing.assert_allclose(in_parts.times, whole.times, atol=0.025)
    assert in_parts.numbers == whole.numbers


def test_notes_at_random_times_have_no_beats():
    rng = np.random.default_rng(2)
    onsets = np.sort(rng.uniform(0, 40, 150))
    notes = [
        Note(t, t + 0.2, int(p), 80) for t, p in zip(onsets, rng.integers(40, 80, 150), strict=True)
    ]
    assert track_beats(notes) is None
    assert track_beats([]) is None


def test_a_tempo_that_is_given_is_kept_to_the_end():
    found = track_beats(band(100, 4, 12), beats_per_minute=100)
    np.testing.assert_allclose(np.diff(found.times), 0.6)
    offset = (np.array(found.times) - 0.4 + 0.3) % 0.6 - 0.3
    assert np.abs(offset).max() < 0.03


def test_features_are_of_the_notes_in_any_order():
    notes = to_array(band(100, 4, 4))
    rng = np.random.default_rng(0)
    shuffled = notes[rng.permutation(len(notes))]
    np.testing.assert_allclose(note_features(notes, 500), note_features(shuffled, 500), atol=1e-6)


# --- the network ---


def test_the_network_is_the_same_in_numpy_and_in_keras(tmp_path, monkeypatch):
    network = training.make_network()
    training.save_weights(network, str(tmp_path / "weights.npz"))
    monkeypatch.setattr(beat_tracker, "WEIGHTS", tmp_path / "weights.npz")
    beat_tracker._load_weights.cache_clear()
    features = note_features(to_array(band(100, 4, 6)), 700)
    try:
        got = beat_logits(features)
    finally:
        beat_tracker._load_weights.cache_clear()
    np.testing.assert_allclose(got, network(features[None])[0], atol=0.02, rtol=0.02)


def test_training_reads_files_whose_beats_are_the_musics_and_writes_weights(tmp_path, capsys):
    songs = tmp_path / "midi" / "songs"
    songs.mkdir(parents=True)
    for number, (bpm, per_bar) in enumerate([(100, 4), (90, 3), (130, 4)]):
        beats = steady(bpm, per_bar, 60, 0.4)
        write_midi(band(bpm, per_bar, 16, number), songs / f"{number}.mid", beats=beats)
    write_midi(band(100, 4, 16), songs / "untimed.mid", beats=unsteady(1))
    output = tmp_path / "weights.npz"
    assert training.main([f"--midi={tmp_path / 'midi'}", f"--output={output}", "--updates=2"]) == 0
    said = capsys.readouterr().out
    assert "songs: 3 of 4 files" in said
    with np.load(output) as weights, np.load(beat_tracker.WEIGHTS) as shipped:
        assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in shipped.items()}


def test_drums_that_play_along_fall_on_the_beats_of_the_piece():
    beats = steady(80, 3, 60)
    piece = training.Piece(
        to_array(band(80, 3, 16)), np.array(beats.times), np.array(beats.numbers)
    )
    drums_beats = steady(120, 4, 60)
    hits = to_array([Note(t, t + 0.05, 36, 90, 0, True) for t in drums_beats.times])
    drums = training.Piece(hits, np.array(drums_beats.times), np.array(drums_beats.numbers))
    played = training.play_along(piece, drums, np.random.default_rng(0))
    assert len(played) > 20
    distances = np.abs(played[:, :1] - piece.times[None]).min(axis=1)
    assert distances.max() < 1e-6


def test_rates_that_no_foot_taps_are_halved_or_doubled():
    fast, slow = training.normal_rate(steady(300, 4, 20)), training.normal_rate(steady(30, 3, 20))
    assert 60 / np.diff(fast[0]).mean() == pytest.approx(150)
    assert fast[1].tolist()[:4] == [1, 2, 1, 2]
    assert 60 / np.diff(slow[0]).mean() == pytest.approx(60)
    assert slow[1].tolist()[:7] == [1, 2, 3, 4, 5, 6, 1]
    assert all(a < b for a, b in itertools.pairwise(slow[0]))


def test_read_midi_gives_the_notes_of_a_file_with_beats(tmp_path):
    notes = [
        Note(0.25, 1.5, 60, 80, 40),
        Note(1.0, 2.0, 64, 70, 0),
        Note(1.5, 1.6, 38, 99, 0, True),
    ]
    write_midi(notes, tmp_path / "a.mid", beats=unsteady(5))
    for got, expected in zip(read_midi(tmp_path / "a.mid"), notes, strict=True):
        assert got == pytest.approx(expected, abs=2e-3)


def spikes(times, num_frames=2000):
    """Log odds [T, 2] that are high at the frames of these beats alone."""
    log_odds = np.full((num_frames, 2), -6.0, np.float32)
    log_odds[np.rint(np.array(times) * beat_tracker.FRAMES_PER_SECOND).astype(int)] = 2.0
    return log_odds


@pytest.mark.parametrize("pickup", [0, 1, 2])
def test_six_eighths_taken_for_three_quarters_keep_their_bar_lines_and_get_two_beats(pickup):
    times = 1.0 + 0.4 * np.arange(24)
    numbers = (np.arange(24) - pickup) % 3 + 1
    bar_lines = times[numbers == 1]
    felt = np.sort(np.concatenate([bar_lines, bar_lines[:-1] + 0.6]))
    dotted, dotted_numbers = beat_tracker._dotted_beats(times, numbers, spikes(felt))
    np.testing.assert_allclose(np.diff(dotted), 0.6)
    np.testing.assert_allclose(dotted[dotted_numbers == 1], bar_lines)
    assert dotted[0] - times[0] < 0.6


def test_three_quarters_stay_three_quarters():
    times = 1.0 + 0.4 * np.arange(24)
    numbers = np.arange(24) % 3 + 1
    assert beat_tracker._dotted_beats(times, numbers, spikes(times)) is None
    numbers[12:] = np.arange(12) % 4 + 1
    assert beat_tracker._dotted_beats(times, numbers, spikes(times[::2])) is None


def test_beats_twice_too_fast_are_known_by_the_weak_ones_between():
    numbers = np.arange(16) % 4 + 1
    alternating = np.where(numbers % 2 == 1, 2.0, -1.0)
    assert beat_tracker._has_weak_beats(alternating, numbers)
    assert not beat_tracker._has_weak_beats(alternating + 1, numbers)  # beats after all
    assert not beat_tracker._has_weak_beats(alternating / 2, numbers)
    assert not beat_tracker._has_weak_beats(alternating, np.arange(16) % 3 + 1)


def test_of_few_beats_all_are_kept():
    strengths, numbers = np.array([-1.0, 2.0, -1.0]), np.array([2, 3, 4])  # halved: one beat
    assert not beat_tracker._has_weak_beats(strengths, numbers)


def test_beats_of_which_none_is_a_downbeat_have_uncertain_bars():
    no_downbeat = np.array([[9.0, -99.0]] * 3, np.float32)
    _, confidence = beat_tracker._number_beats(no_downbeat)
    assert confidence == 0
