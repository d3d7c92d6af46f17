"""Batches cut on the device are those that the pipeline cuts on the host."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import pytest

from mt3_keras.data.pipeline import Chunk, ChunkMaker, PipelineConfig
from mt3_keras.data.records import Record
from mt3_keras.data.shards import cut_pieces, synthetic_source, write_records
from mt3_keras.models.config import HEADS, SMALL
from mt3_keras.notes import Note
from mt3_keras.synth.synthetic import SyntheticConfig
from tests.detectors import MINI
from tests.training_run import write_model
from train.history import describe_run

pytest.importorskip("jax", reason="needs jax: pip install -r requirements-dev.txt")

import train.resident as resident

SEGMENT_FRAMES, HOP = SMALL.window_frames, 256


def make_record(num_frames: int, seed: int) -> Record:
    """Noise, with notes that have nothing to do with it."""
    chance = np.random.default_rng(seed)
    samples = chance.uniform(-1, 1, num_frames * HOP).astype(np.float32)
    seconds = num_frames * HOP / 16_000
    notes = []
    for onset in chance.uniform(0, seconds - 0.1, 40):
        is_drum = bool(chance.random() < 0.3)
        program = 0 if is_drum else int(chance.integers(128))
        offset = min(seconds, onset + chance.uniform(0.01, 1))
        pitch, velocity = (int(n) for n in chance.integers((18, 1), (112, 128)))
        notes.append(Note(onset, offset, pitch, velocity, program, is_drum))
    (record,) = cut_pieces("x", samples, notes)
    return record


def pieces_of(*records: Record) -> list[resident.Packed]:
    return [resident.pack_record(record, SMALL) for record in records]


def batch_of(*records: Record, batch_size: int = 4, **options: Any) -> dict[str, np.ndarray]:
    batches = resident.ResidentBatches(pieces_of(*records), SMALL, batch_size, **options)
    return {name: np.asarray(array) for name, array in next(batches).items()}


def host_chunks() -> ChunkMaker:
    return ChunkMaker([], PipelineConfig(data=(), context="full"), SMALL)


def chunks_of_rows(batch: dict[str, np.ndarray], chunks: Sequence[Chunk]) -> list[int]:
    """Which chunk each row of a batch is, number by number; fails where it is none of them."""
    found = []
    for row, samples in enumerate(batch["samples"]):
        best = int(np.argmin([np.abs(chunk.samples - samples).sum() for chunk in chunks]))
        np.testing.assert_allclose(samples, chunks[best].samples, atol=1e-4)
        for head in HEADS:
            np.testing.assert_array_equal(batch[head][row], chunks[best].rolls[head], head)
        named = chunks[best].rolls
        cells = {tuple(c): tuple(p) for c, p in zip(named["cells"], named["programs"], strict=True)}
        for cell, programs in zip(batch["cells"][row], batch["programs"][row], strict=True):
            if len(cells) < len(named["cells"]) and programs[0] >= 0:  # all are in both
                assert cells[tuple(cell)] == tuple(programs)
        assert chunks[best].num_frames == SEGMENT_FRAMES
        found.append(best)
    return found


def test_a_row_is_a_chunk_of_the_pipeline() -> None:
    record = make_record(SEGMENT_FRAMES + 30, 0)
    chunks = [host_chunks().chunk([record], [start]) for start in range(31)]
    assert len(set(chunks_of_rows(batch_of(record, batch_size=16), chunks))) > 5


def test_a_mixed_row_is_the_pipelines_mix() -> None:
    records = [make_record(SEGMENT_FRAMES, seed) for seed in (1, 2)]
    make = ChunkMaker([], PipelineConfig(data=(), context="full", num_mixed=2), SMALL)
    choices = [(0,), (1,), (0, 0), (0, 1), (1, 1)]
    chunks = [make.chunk([records[i] for i in c], [0] * len(c)) for c in choices]
    found = chunks_of_rows(batch_of(*records, batch_size=24, num_mixed=2), chunks)
    assert 3 in found
    assert {0, 1} & set(found)


def test_what_is_beyond_a_short_piece_is_not_learned_from() -> None:
    record = make_record(50, 3)
    batch = batch_of(record, batch_size=2)
    chunk = host_chunks().chunk([record], [0])
    for head in HEADS:
        assert (batch[head][:, 50:] == -1).all()
        np.testing.assert_array_equal(batch[head][1, :50], chunk.rolls[head][:50])


def test_a_batch_has_what_a_detector_takes() -> None:
    batch = batch_of(make_record(SEGMENT_FRAMES, 6), batch_size=2)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "samples": ((2, SMALL.input_samples), "float32"),
        **{head: ((2, SEGMENT_FRAMES, size), "int8") for head, size in HEADS.items()},
        "cells": ((2, 32, 2), "int32"),
        "programs": ((2, 32, 2), "int32"),
    }


def test_the_stream_is_resumed_from_its_state_and_levels_vary() -> None:
    pieces = pieces_of(make_record(400, 4), make_record(400, 5))
    options = {"seed": 7, "max_attenuation_db": 20.0}

    def stream() -> resident.ResidentBatches:
        return resident.ResidentBatches(pieces, SMALL, 8, **options)  # type: ignore[arg-type]

    first = stream()
    batches = [next(first) for _ in range(4)]
    second = stream()
    next(second)
    state = json.loads(json.dumps(second.get_state()))
    third = stream()
    third.set_state(state)
    again = [next(third) for _ in range(3)]
    for one, other in zip(batches[1:], again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    peaks = np.concatenate([np.abs(b["samples"]).max(axis=1) for b in batches])
    assert 0.09 < peaks.min() < 0.4 < peaks.max() < 1.01
    for batch_size, data in ((4, None), (8, ["other"])):
        stream_of_other = resident.ResidentBatches(pieces, SMALL, batch_size, data=data, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="other data or settings"):
            stream_of_other.set_state(state)


def test_no_pieces_is_said() -> None:
    with pytest.raises(ValueError, match="no pieces"):
        resident.ResidentBatches([], SMALL, 4)


def test_a_run_trains_from_the_devices_memory_and_says_what_it_needs(
    tmp_path: pathlib.Path,
) -> None:
    source = tmp_path / "data"
    config = SyntheticConfig(seconds=3.0)
    write_records([synthetic_source(config, 0)], source, name="random", split="train", num_shards=1)
    mini = dataclasses.replace(MINI.network, segment_frames=32)
    model = write_model(tmp_path, dataclasses.replace(MINI, network=mini))
    command = [sys.executable, "-m", "train.main", f"--model={model}", f"--data={source}"]
    command += [f"--out_dir={tmp_path / 'run'}", "--batch_size=2", "--steps=2", "--log_steps=2"]
    command += ["--checkpoint_steps=2", "--validate_steps=2", "--optimizer=adam"]
    command += ["--notensorboard", "--resident"]
    # The step is run twice: to optimise it takes a minute.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": quick}
    without = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert without.returncode == 1
    assert "--resident needs KERAS_BACKEND=jax and --validation_split=" in without.stderr
    command.append("--validation_split=")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["onset_loss"] > 0
    assert 0 < describe_run(tmp_path / "run")["hours_trained"] < 1
    with h5py.File(tmp_path / "run" / "model.weights.h5") as file:
        norm = file["layers/detector_body/norms/batch_normalization/vars"]
        assert np.any(norm["2"][:] != 0), "the norm has seen nothing: training was not told so"
