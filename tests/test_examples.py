"""The example clips: their notes are those of the scores, and are heard when they are written."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import soundfile

from mt3_keras.midi import read_midi
from mt3_keras.models.config import SAMPLE_RATE_HZ
from mt3_keras.notes import sort_notes

make_clips = pytest.importorskip("examples.make_clips", reason="needs requirements-train.txt")
HOP_SAMPLES = 80


@pytest.mark.parametrize("name", make_clips.CLIPS)
def test_the_midi_files_hold_the_scores(name: str) -> None:
    beats_per_minute, parts = make_clips.CLIPS[name]
    written = sort_notes(
        note._replace(onset=round(note.onset, 3), offset=round(note.offset, 3))
        for part in parts
        for note in make_clips.read_part(part, beats_per_minute)
    )
    found = read_midi(make_clips.FOLDER / f"{name}.mid")
    np.testing.assert_allclose(np.array(found, float), np.array(written, float), atol=1e-6)


@pytest.mark.parametrize("name", make_clips.CLIPS)
def test_every_onset_is_heard_at_its_time(name: str) -> None:
    samples, rate_hz = soundfile.read(make_clips.FOLDER / f"{name}.flac", dtype="float32")
    assert (rate_hz, samples.ndim) == (SAMPLE_RATE_HZ, 1)
    notes = read_midi(make_clips.FOLDER / f"{name}.mid")
    assert max(note.offset for note in notes) < len(samples) / rate_hz
    strength = librosa.onset.onset_strength(y=samples, sr=rate_hz, hop_length=HOP_SAMPLES)
    for onset in {note.onset for note in notes}:
        frame = round(onset * rate_hz / HOP_SAMPLES)
        assert strength[frame - 4 : frame + 8].max() > 2.5 * np.median(strength), onset


def test_a_voice_is_read_as_it_is_written() -> None:
    notes = make_clips.read_voice("p C4:1 -:.5 mf D4+F4:.5 | ped C4:1 kick:2", 5, 120)
    lead = make_clips.LEAD_SECONDS
    heard = [(n.onset - lead, n.offset - lead, n.pitch, n.velocity, n.is_drum) for n in notes]
    assert heard == [
        (0.0, 0.5, 60, 52, False),
        (0.75, 1.0, 62, 72, False),
        (0.75, 1.0, 65, 72, False),
        (1.0, 2.5, 60, 80, False),
        (1.5, 1.625, 36, 80, True),
    ]
