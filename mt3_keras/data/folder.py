"""A folder of one's own: recordings with MIDI files of the same names, or a manifest of pairs.

    mine/
      song.flac  song.mid                  pairs by name, in any subfolders
      audio/other.m4a  midi/other.mid      or by name alone, where it is the only one
      train/...  validation/...  test/...  splits, if there are such folders

`manifest.json`, if there is one, is all that counts: it lists "items", each with "id", "audio",
"midi" (paths in the folder) and perhaps "split". `train.evaluate --data` reads the same file.

Splits that are not given are made: the ids are put in the order of their digests, the first are
for validation, the next for testing. The same files give the same splits. What has no partner, or
cannot be found, is named in a warning and left out.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mt3_keras.audio import AUDIO_SUFFIXES
from mt3_keras.data.example import (
    DatasetError,
    Example,
    Label,
    check_files,
    check_request,
    describe,
)
from mt3_keras.files import open_regular
from mt3_keras.midi import read_midi
from mt3_keras.notes import Note

NAME = "folder"
SOURCE = "your own files"
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
MIDI_SUFFIXES = frozenset((".mid", ".midi"))
MAX_MANIFEST_BYTES = 2**28

_OTHER_NAMES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}
_logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A recording and its MIDI file; `split` is None where none is given."""

    id: str
    audio: pathlib.Path
    midi: pathlib.Path
    split: str | None = None


def find(
    root: str | pathlib.Path,
    split: str,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    skip_missing: bool = False,
) -> list[Example]:
    """Lists the pairs of a split.

    Args:
      root: the folder.
      split: one of `SPLITS`.
      validation: share of the pairs for validation, where no splits are given.
      test: share for testing.
      skip_missing: as of other data sets; what is missing is left out anyhow.

    Raises:
      ValueError: no such split, or shares that leave nothing.
      DatasetError: the folder or its manifest cannot be read, or the split is empty.
    """
    root = pathlib.Path(root)
    check_request(NAME, SOURCE, root, split, SPLITS)
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            f"validation and test must be shares that leave something for training: "
            f"got {validation} and {test}"
        )
    has_manifest = (root / MANIFEST).exists()
    pairs = list(_read_pairs(root) if has_manifest else _find_pairs(root))
    if not pairs:
        raise DatasetError(
            f"{root}: holds no recording with a MIDI file of the same name; "
            f"name them alike or write a {MANIFEST}"
        )
    chosen = [pair for pair in _with_splits(pairs, validation, test) if pair.split == split]
    if not chosen:
        raise DatasetError(f"{root}: none of its {len(pairs)} pairs is for {split}")
    examples = [
        Example(
            id=pair.id,
            dataset=NAME,
            split=split,
            audio=(pair.audio,),
            labels=(Label(pair.midi),),
            read_notes=read_notes,
        )
        for pair in chosen
    ]
    return check_files(examples, SOURCE, root, skip_missing)


def read_notes(label: Label) -> list[Note]:
    """Reads a MIDI file, pedal applied; ValueError if it is damaged."""
    return read_midi(label.path)


def read_manifest(folder: pathlib.Path) -> list[Any]:
    """The items of a folder's manifest as they stand there; see `check_item`.

    Raises:
      DatasetError: there is none, or it is no JSON with a list of items.
    """
    path = folder / MANIFEST
    with open_regular(path, DatasetError) as file:
        content = file.read(MAX_MANIFEST_BYTES)
    try:
        items: list[Any] = json.loads(content)["items"]
        if not isinstance(items, list) or not items:
            raise ValueError("no list of items")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest ({describe(error)[:200]})") from error
    return items


def check_item(folder: pathlib.Path, item: Any) -> Pair:
    """The pair that an item of a manifest names.

    Raises:
      DatasetError: a part is missing or of the wrong kind, or there is no such file.
    """
    path = folder / MANIFEST
    fields = item if isinstance(item, Mapping) else {}
    texts = [text for key in ("id", "audio", "midi") if isinstance(text := fields.get(key), str)]
    if len(texts) < 3 or not all(texts):
        raise DatasetError(f"{path}: an item needs the texts id, audio and midi: got {item!r:.80}")
    name, audio, midi = texts
    split = fields.get("split")
    split = _OTHER_NAMES.get(split, split) if isinstance(split, str) else split
    if split not in (None, *SPLITS):
        raise DatasetError(f"{path}: {name}: split must be of {', '.join(SPLITS)}: got {split!r}")
    for file in (folder / audio, folder / midi):
        try:
            if file.is_file():
                continue
        except (OSError, ValueError):  # too long a name, a null character
            pass
        raise DatasetError(f"{file!s:.300}: no such file; {path} names it")
    return Pair(name, folder / audio, folder / midi, split)


def _read_pairs(root: pathlib.Path) -> Iterable[Pair]:
    seen: set[str] = set()
    for item in read_manifest(root):
        try:
            pair = check_item(root, item)
        except DatasetError as error:
            _logger.warning("%s; left out", error)
            continue
        if pair.id in seen:
            _logger.warning("%s: names %s twice; once left out", root / MANIFEST, pair.id)
            continue
        seen.add(pair.id)
        yield pair


def _find_pairs(root: pathlib.Path) -> Iterable[Pair]:
    files = [
        path
        for path in sorted(root.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file()
    ]
    recordings = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    scores = [path for path in files if path.suffix.lower() in MIDI_SUFFIXES]
    beside: dict[pathlib.Path, pathlib.Path] = {}
    for path in scores:
        beside.setdefault(path.with_suffix(""), path)
    stems = collections.Counter(path.stem for path in [*recordings, *scores])
    alone = {path.stem: path for path in scores if stems[path.stem] == 2}
    left = set(recordings) | set(scores)
    for recording in recordings:
        midi = beside.get(recording.with_suffix("")) or alone.get(recording.stem)
        if midi is None or midi not in left:
            continue
        left -= {recording, midi}
        place = recording.relative_to(root)
        known = _OTHER_NAMES.get(place.parts[0], place.parts[0])
        split = known if len(place.parts) > 1 and known in SPLITS else None
        yield Pair(place.with_suffix("").as_posix(), recording, midi, split)
    if left:
        first = ", ".join(str(path.relative_to(root)) for path in sorted(left)[:3])
        text = "%s: %d files have no partner of the same name and are left out (%s%s)"
        _logger.warning(text, root, len(left), first, ", ..." if len(left) > 3 else "")


def _with_splits(pairs: list[Pair], validation: float, test: float) -> list[Pair]:
    """Pairs with their splits: those given, else made of shares of all pairs."""
    if any(pair.split for pair in pairs):
        return [pair._replace(split=pair.split or "train") for pair in pairs]
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).digest())
    counts = [
        max(1, round(share * len(pairs))) if share and len(pairs) > 2 else 0
        for share in (validation, test)
    ]
    names = ["validation"] * counts[0] + ["test"] * counts[1]
    names += ["train"] * (len(pairs) - len(names))
    return [pair._replace(split=name) for pair, name in zip(ordered, names, strict=True)]
