"""Damaged and odd inputs of every kind: each is read, or refused in one line that says why.

    python -m benchmarks.fuzz --count 400 --seed 1 [--kinds audio,midi]

Every situation follows from its kind and a number, so that a fault can be made again. Faults are
any other exception, a message of several lines, and sound that is missing without a word.
"""

from __future__ import annotations

import collections
import json
import logging
import pathlib
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import soundfile
from absl import flags

from mt3_keras.audio import AUDIO_SUFFIXES, find_audio, read_blocks, resample
from mt3_keras.cli.command_line import Command, Flags, check_names, run
from mt3_keras.cli.transcribe import parse_beats, plan_outputs
from mt3_keras.instrument_names import instrument_name, parse_instruments
from mt3_keras.midi import read_midi, write_midi
from mt3_keras.models.catalog import find_preset
from mt3_keras.models.checksums import COVERED, FILE, check_sum
from mt3_keras.models.preset_config import read_config
from mt3_keras.note_rolls import RollDecoding
from mt3_keras.notes import Note, check_notes
from mt3_keras.process import printable
from mt3_keras.segments import check_samples
from mt3_keras.stems import read_name

LONGEST_MESSAGE = 1000
SILENT_LOSS = 0.15  # seconds that a cut recording may lack without a word
FORMATS = (
    *(("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "ULAW"), ("flac", "PCM_16")),
    *(("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III"), ("aiff", "PCM_16")),
    *(("au", "PCM_16"), ("caf", "PCM_16"), ("w64", "PCM_16"), ("rf64", "PCM_16")),
)
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf"), 0.5),
    *("", "x", "x" * 5000, "\0", "../../x", "\x1b[31m", [], {}, [[[]]], [None], {"a": {}}),
)

Rng = random.Random
Situation = Callable[[Rng, pathlib.Path], None]


class Fault(Exception):  # noqa: N818 - what is looked for
    """A situation that was neither read nor refused as it should be."""


def damage(content: bytes, rng: Rng) -> bytes:
    """Bytes with one to three changes, a third of them near the start."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not changed:
            break
        at = rng.randrange(min(len(changed), 200) if rng.random() < 0.35 else len(changed))
        length = rng.randint(1, 400)
        block = bytes(changed[at : at + length])
        kind = rng.randrange(8)
        if kind == 0:
            changed[at : at + length] = rng.randbytes(len(block))
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = rng.randbytes(length)
        elif kind == 5:
            changed[at:at] = block
        elif kind == 6:
            changed[at : at + length] = bytes(len(block))
        else:
            changed[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(changed)


def damage_json(content: Any, rng: Rng) -> bytes:
    """A JSON text with a value replaced or left out, or with damaged bytes."""
    if rng.random() < 0.2:
        return damage(json.dumps(content).encode(), rng)
    content = json.loads(json.dumps(content))
    places = [
        (part, key)
        for part in _walk(content)
        for key in (part if isinstance(part, dict) else range(len(part)))
    ]
    part, key = rng.choice(places)
    if rng.random() < 0.25:
        del part[key]
    else:
        part[key] = rng.choice(ODD)
    text = json.dumps(content)
    return (text if rng.random() < 0.95 else "[" * 20_000).encode()


def _walk(content: Any) -> Iterator[Any]:
    if isinstance(content, (dict, list)):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from _walk(value)


# --- The kinds ---


def _audio(rng: Rng, folder: pathlib.Path) -> None:
    suffix, subtype = rng.choice(FORMATS)
    rate = 48_000 if subtype == "OPUS" else rng.choice([8000, 16_000, 22_050, 44_100])
    samples = 0.3 * np.sin(np.arange(rate) * rng.uniform(0.05, 0.5))
    path = folder / f"a.{suffix}"
    soundfile.write(path, np.stack([samples] * rng.randint(1, 2), axis=1), rate, subtype)
    content = path.read_bytes()
    is_cut = rng.random() < 0.3
    if is_cut:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.write_bytes(damage(content, rng))
    with _warnings() as told:
        seconds = 0.0
        for block in read_blocks(path):
            _expect(bool(np.isfinite(block).all()), "samples that are not finite")
            seconds += block.size / 16_000
    _expect(seconds < 120, f"a second became {seconds:.0f} s")
    if is_cut and seconds < 1 - SILENT_LOSS:
        _expect(bool(told), f"{1 - seconds:.2f} s of {suffix} {subtype} lost without a word")


def _midi(rng: Rng, folder: pathlib.Path) -> None:
    path = folder / "a.mid"
    onsets = [i / 4 for i in range(rng.randint(1, 40))]
    notes = [
        Note(t, t + rng.uniform(0.1, 2), rng.randrange(128), 90, rng.randrange(128), t % 1 == 0)
        for t in onsets
    ]
    write_midi(notes, path)
    path.write_bytes(damage(path.read_bytes(), rng))
    with _warnings():
        check_notes(read_midi(path))


def _config(rng: Rng, folder: pathlib.Path) -> None:
    content = json.loads((find_preset("small") / "config.json").read_text())
    (folder / "config.json").write_bytes(damage_json(content, rng))
    read_config(folder)


def _decoding(rng: Rng, folder: pathlib.Path) -> None:
    content = json.loads((find_preset("small") / "decoding.json").read_text())
    (folder / "decoding.json").write_bytes(damage_json(content, rng))
    RollDecoding.read(folder)


def _bundle(rng: Rng, folder: pathlib.Path) -> None:
    name = rng.choice([*COVERED, FILE, FILE])
    for file in (*COVERED, FILE):
        shutil.copy(find_preset("small") / file, folder)
    content = (folder / name).read_bytes()
    damaged = damage(content, rng)
    (folder / name).write_bytes(damaged)
    if name == FILE:
        for file in COVERED:
            check_sum(folder / file)
    elif damaged != content:
        try:
            check_sum(folder / name)
        except ValueError:
            raise
        raise Fault(f"a changed {name} was not noticed")


def _manifest(rng: Rng, folder: pathlib.Path) -> None:
    from mt3_keras.data import folder as own

    for name in "ab":
        (folder / f"{name}.wav").touch()
        write_midi([Note(0.0, 1.0, 60, 90)], folder / f"{name}.mid")
    items = [
        {"id": name, "audio": f"{name}.wav", "midi": f"{name}.mid", "split": "train"}
        for name in "ab"
    ]
    (folder / own.MANIFEST).write_bytes(damage_json({"items": items}, rng))
    with _warnings():
        for example in own.find(folder, "train"):
            example.load_notes()


def _labels(rng: Rng, folder: pathlib.Path) -> None:
    from mt3_keras.data import guitarset, musicnet, urmp
    from mt3_keras.data.example import Example, Label

    rows = [(i / 2, rng.uniform(0.05, 2), rng.randint(30, 90)) for i in range(rng.randint(1, 20))]
    kind: Any = rng.choice([guitarset, musicnet, urmp])
    if kind is guitarset:
        data = [{"time": t, "duration": d, "value": p} for t, d, p in rows]
        content = damage_json({"annotations": [{"namespace": "note_midi", "data": data}]}, rng)
    elif kind is musicnet:
        lines = [f"{int(44_100 * t)},{int(44_100 * (t + d))},41,{p}" for t, d, p in rows]
        content = damage("\n".join(["start_time,end_time,instrument,note", *lines]).encode(), rng)
    else:
        content = damage("\n".join(f"{t} {440 * d} {d}" for t, d, _ in rows).encode(), rng)
    path = folder / "labels.csv"
    path.write_bytes(content)
    label = Label(path, 24)
    with _warnings():
        check_notes(Example("x", "set", "train", (), (label,), kind.read_notes).load_notes())


def _names(rng: Rng, folder: pathlib.Path) -> None:
    """Recordings of any names: found as they are, and their outputs inside the folder."""
    root, out = folder / "in", folder / "out"
    root.mkdir()
    made = []
    for _ in range(rng.randint(1, 6)):
        letters = "ab.-~$*?[]{}()%&;|<> \t\x1b\x07'\"\\\xe9\u266b\u202e"
        name = "".join(rng.choice(letters) for _ in range(rng.randint(1, 30)))
        path = root / (name + rng.choice(sorted(AUDIO_SUFFIXES)))
        path.touch()
        made.append(path)
        _expect(printable(str(path)).isprintable(), "control codes for a terminal")
        read_name(path.stem)
    hidden = {path for path in made if path.name.startswith(".")}
    if set(made) - hidden:
        _expect(set(find_audio([root])) == set(made) - hidden, "recordings were not found")
    given = sorted(set(made))
    _expect(set(find_audio(given)) == set(given), "a recording's name was read as a pattern")
    jobs = plan_outputs(given, [str(root)], str(out), ["mid", "json"])
    outputs = [path for job in jobs for path in job.outputs]
    _expect(len(set(outputs)) == 2 * len(given), "two recordings share an output")
    for path in outputs:
        _expect(path.resolve().is_relative_to(out.resolve()), f"{path!r} is outside")


def _words(rng: Rng, _: pathlib.Path) -> None:
    known = [instrument_name(rng.randrange(128), False), "drums", "sax", "33", "200", "", "-1", "½"]
    items = [
        "".join(rng.sample(word, len(word))) if rng.random() < 0.3 else word
        for word in rng.choices(known, k=rng.randint(1, 5))
    ]
    parse_instruments(",".join(items))
    parse_beats(rng.choice(["auto", "off", "120", "0", "nan", "1e9", "-1", "x", ""]))


def _samples(rng: Rng, _: pathlib.Path) -> None:
    shape: Any = rng.choice([100, 100, 1, 0, (100, 2), ()])
    kind = rng.choice(
        [*["float32", "float64", "float16"] * 4, "int16", "uint8", "bool", "complex64", "O"]
    )
    generator = np.random.default_rng(rng.randrange(2**32))
    array: Any = np.asarray(10.0 ** rng.uniform(-6, 12) * generator.normal(size=shape))
    with np.errstate(all="ignore"):
        array = array.astype(kind)
    if array.size and rng.random() < 0.2 and kind.startswith("float"):
        array.flat[0] = rng.choice([np.nan, np.inf, -np.inf])
    rate = rng.choice([*[16_000, 44_100, 8000.5] * 4, 0, -1, float("nan"), float("inf"), 1e12])
    with _warnings():
        _expect(bool(np.isfinite(resample(check_samples(array), rate)).all()), "not finite")


def _commands(rng: Rng, folder: pathlib.Path) -> None:
    """Commands of other commands' files: an exit code and lines without a traceback."""
    from mt3_keras.__main__ import COMMANDS, main

    write_midi([Note(0.0, 1.0, 60, 90)], folder / "a.mid")
    (folder / "b.mid").write_bytes(damage((folder / "a.mid").read_bytes(), rng))
    (folder / "c.wav").write_bytes(rng.randbytes(rng.randrange(200)))
    words = ["a.mid", "b.mid", "c.wav", "none", "", "-", "\x1b[31m", "\0", "*", "~", "100%"]
    flag_names = ["reference", "estimate", "model", "threads", "beats", "formats", "instruments"]
    light = [name for name in COMMANDS if name in ("evaluate", "instruments", "transcribe")]
    arguments = [rng.choice([*light, "nothing", ""])]
    for _ in range(rng.randint(0, 4)):
        value = rng.choice(words)
        place = str(folder / value) if value.endswith((".mid", ".wav")) else value
        named = f"--{rng.choice(flag_names)}={place}"
        arguments.append(rng.choice([place, named]))
    # Nothing is transcribed here: a model that does not exist comes last.
    if arguments[0] == "transcribe":
        arguments += [f"--output_dir={folder}/out", "--model=none", "--noprogress"]
    with _streams() as (out, errors):
        code = main(arguments)
    text = out.getvalue() + errors.getvalue()
    _expect(code in (0, 1, 2, 3), f"exit code {code}")
    _expect("Traceback" not in text and "\x1b" not in text, f"{arguments}: {text[-500:]!r}")
    if code:
        raise ValueError(errors.getvalue().strip().splitlines()[-1])


KINDS: dict[str, Situation] = {
    "audio": _audio,
    "midi": _midi,
    "configs": _config,
    "readings": _decoding,
    "weights": _bundle,
    "manifests": _manifest,
    "labels": _labels,
    "names": _names,
    "words": _words,
    "samples": _samples,
    "commands": _commands,
}


# --- Running them ---


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Fault(otherwise)


class _warnings:  # noqa: N801 - reads as the statement it is
    """Collects what the library warns of meanwhile, and keeps it off the terminal."""

    def __enter__(self) -> list[str]:
        self._logger, told = logging.getLogger("mt3_keras"), []
        self._handler = logging.Handler()
        self._handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        self._propagates = self._logger.propagate
        self._logger.addHandler(self._handler)
        self._logger.propagate = False
        return told

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.propagate = self._propagates


class _streams:  # noqa: N801
    """Standard streams in memory; standard input is empty."""

    def __enter__(self) -> tuple[Any, Any]:
        import io

        self._own = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
        return sys.stdout, sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdin, sys.stdout, sys.stderr = self._own


def try_one(kind: str, number: int) -> str:
    """Makes a situation and returns what came of it: "read" or "refused".

    Raises:
      Fault: it was neither.
    """
    rng = random.Random(f"{kind} {number}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            KINDS[kind](rng, pathlib.Path(folder))
        except Fault as fault:
            raise Fault(f"{kind} {number}: {fault}") from fault
        except ValueError as error:
            text = str(error)
            if not text or "\n" in text or len(text) > LONGEST_MESSAGE:
                raise Fault(f"{kind} {number}: not one line: {text!r:.300}") from error
            return "refused"
        except Exception as error:
            where = traceback.format_exc(limit=-3)
            raise Fault(f"{kind} {number}: {type(error).__name__}\n{where}") from error
    return "read"


def try_all(
    kinds: Sequence[str], first: int, count: int
) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Tries `count` situations of each kind; what came of them, and the faults."""
    found: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    faults = []
    for kind in kinds:
        for number in range(first, first + count):
            try:
                found[kind][try_one(kind, number)] += 1
            except Fault as fault:
                found[kind]["fault"] += 1
                faults.append(str(fault))
    return found, faults


def main(argv: Sequence[str]) -> int:
    """Returns the exit code, 1 where there was a fault."""
    return run("benchmarks.fuzz", COMMAND, argv)


def _define_flags(add: Flags) -> None:
    add.count("count", 400, "Situations of each kind.")
    add.count("seed", 0, "Other seeds make other situations.", least=0)
    add.names("kinds", list(KINDS), f"Of {', '.join(KINDS)}.")


def _fuzz(values: flags.FlagValues, _: list[str]) -> int:
    check_names("kinds", values.kinds, KINDS)
    found, faults = try_all(values.kinds, 10**6 * values.seed, values.count)
    print("| kind | tried | read | refused in a line | faults |\n| --- | --- | --- | --- | --- |")
    for kind, counts in found.items():
        columns = (counts.total(), counts["read"], counts["refused"], counts["fault"])
        print(f"| {kind} | {' | '.join(map(str, columns))} |")
    for fault in faults:
        print(printable(fault), file=sys.stderr)
    return 1 if faults else 0


COMMAND = Command("[FLAGS]", __doc__, _define_flags, _fuzz)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
