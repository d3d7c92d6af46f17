"""What the documentation names exists: commands, their flags, files and functions."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shlex

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands() -> list[tuple[str, str]]:
    """(page, command) of every indented command line; lines that end in a backslash go on."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^    (.*)$", text, re.MULTILINE):
            found += [(page.name, part.strip()) for part in re.split(r" && | \| |  # ", line)]
    return found


OURS = [(page, line) for page, line in shown_commands() if line.startswith(("mt3 ", "python -m "))]


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What --help prints for a command."""
    module = "mt3_keras.__main__" if words[0] == "mt3" else words[2]
    subcommand = words[1:2] if words[0] == "mt3" else []
    assert importlib.import_module(module).main([*subcommand, "--help"]) == 0, words
    return capsys.readouterr().out


def test_the_documentation_shows_every_command_of_ours():
    shown = {words[1] for _, line in OURS if (words := shlex.split(line))[0] == "mt3"}
    commands = importlib.import_module("mt3_keras.__main__").COMMANDS
    assert {*commands} - {"instruments"} <= shown <= {*commands}


@pytest.mark.parametrize(("page", "line"), OURS)
def test_every_command_shown_has_the_flags_shown(page, line, capsys):
    words = shlex.split(line)
    text = help_of(words, capsys)
    for word in itertools.takewhile(lambda word: word != "--", words):  # another library's follow
        if word.startswith("--"):
            flag = word[2:].partition("=")[0].removeprefix("no")
            assert re.search(rf"--(\[no\])?(no)?{flag}\b", text), (page, word)


def test_every_flag_of_the_tables_on_transcribing_exists(capsys):
    text = help_of(["mt3", "transcribe"], capsys)
    rows = re.findall(r"^\| `--(\w+)", (ROOT / "docs/transcribing.md").read_text(), re.MULTILINE)
    assert rows
    for flag in rows:
        assert re.search(rf"--(\[no\])?{flag.removeprefix('no')}\b", text), flag


def test_every_make_target_shown_exists():
    shown = {line.split()[1] for _, line in shown_commands() if line.startswith("make ")}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"transcribe", "test"} <= shown <= {*targets}


def test_files_named_in_the_architecture_exist_with_their_functions():
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 30
    for path, functions in rows:
        tree = ast.parse((ROOT / path).read_text())
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        names = {name for name in re.findall(r"`([\w/]+)`", functions) if "/" not in name}
        assert names - {"find", "encode_segments"} <= defined, path


def test_the_picture_of_the_tree_has_the_modules_of_the_library_and_no_others():
    picture = (ROOT / "docs/architecture.md").read_text().split("```")[1].split("\ntrain/")[0]
    library, named = ROOT / "mt3_keras", {*re.findall(r"\w+\.py", picture)}
    folders = [library, library / "models", library / "engines"]
    files = {path.name for folder in folders for path in folder.glob("[!_]*.py")}
    assert named == files
