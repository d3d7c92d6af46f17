"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from mt3_keras import files
from mt3_keras.files import open_regular, replacing


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "old.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_a_name_of_255_bytes_is_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / ("é" * 125 + ".json")
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and len(names(tmp_path)) == 1


def test_a_link_is_replaced_and_not_followed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def test_temporary_names_cannot_be_foreseen(tmp_path: pathlib.Path) -> None:
    assert replacing(tmp_path / "a").temporary != replacing(tmp_path / "a").temporary


def test_a_device_is_not_replaced(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ValueError, match="pipe: is not a regular file"),
        replacing(tmp_path / "pipe"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_errors_name_the_file_that_was_asked_for(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "missing" / "a.json", tmp_path / ("a" * 300)):
        with pytest.raises(OSError) as caught, replacing(path):
            pass
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, replacing(tmp_path / "full.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "full.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / "folder"):
        pass
    assert caught.value.filename == str(tmp_path / "folder")
    assert names(tmp_path) == ["folder"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
import os, signal
from mt3_keras.files import replacing
with replacing({str(tmp_path / "killed")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(names(tmp_path)) == 1
    with replacing(tmp_path / "first") as living:
        monkeypatch.setattr(files, "_swept", set())
        with replacing(tmp_path / "second"):
            assert living.exists()
            assert len(names(tmp_path)) == 2
    assert names(tmp_path) == ["first", "second"]


def test_only_regular_files_are_opened(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, reason in (
        ("pipe", "not a regular file"),
        ("empty", "0 bytes"),
        ("none", "no such file"),
        (".", "is a folder"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(LookupError, match=reason):
            open_regular(tmp_path / name, LookupError)
