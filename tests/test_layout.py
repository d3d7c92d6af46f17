"""The tree keeps its shape (`tests.layout`), and what would spoil it is found."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable

import pytest

from tests.conftest import ROOT
from tests.layout import KERAS, Rule, bazel_faults, import_faults

ALL_RULES = 'kind("py_(binary|library|test) rule", //...)'
BAZEL_FILES = ("MODULE.bazel", "WORKSPACE", "native_rules.bzl")

Query = Callable[[pathlib.Path], dict[str, Rule]]


@pytest.fixture(scope="module")
def query(tmp_path_factory: pytest.TempPathFactory) -> Query:
    """Asks Bazel for all rules of a workspace; label -> rule."""
    bazel = shutil.which("bazel")
    if bazel is None:
        pytest.skip("needs Bazel, for example Debian's bazel-bootstrap")
    cache = tmp_path_factory.mktemp("bazel")

    def ask(root: pathlib.Path) -> dict[str, Rule]:
        if " " in str(root):
            pytest.skip(f"Bazel refuses paths with spaces: {root}")
        answer = subprocess.run(  # --batch leaves no server behind
            [bazel, "--batch", f"--output_user_root={cache}", "query", "--output=xml", ALL_RULES],
            cwd=root,
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr
        # Python reads XML 1.0 only, and Bazel's first line claims 1.1.
        found = xml.etree.ElementTree.fromstring(answer.stdout.split("\n", 1)[1])
        return {
            rule.attrib["name"]: Rule(
                rule.attrib["class"], _labels(rule, "srcs"), _labels(rule, "deps")
            )
            for rule in found.iter("rule")
        }

    return ask


def _labels(rule: xml.etree.ElementTree.Element, name: str) -> list[str]:
    return [label.attrib["value"] for label in rule.iterfind(f"list[@name='{name}']/label")]


def _plant(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_imports_keep_to_their_rows() -> None:
    assert not import_faults(ROOT)


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("mt3_keras/stray.py", "", "add mt3_keras.stray to MODULES"),
        ("mt3_keras/notes.py", "import numpy", ":1: mt3_keras.notes must not import numpy"),
        ("mt3_keras/notes.py", "def f():\n import keras", ":2: mt3_keras.notes must not import"),
        ("mt3_keras/notes.py", "from . import midi", "which does not stand above it"),
        ("mt3_keras/notes.py", "from mt3_keras import midi", "which does not stand above it"),
        ("mt3_keras/midi.py", "import train.main", "mt3_keras must not import train.main"),
        ("mt3_keras/midi.py", "from tests import conftest", "mt3_keras.midi must not import tests"),
        ("mt3_keras/transcriber.py", "import keras", "must not import keras outside functions"),
        ("train/main.py", "from export import tflite", "train must not import export.tflite"),
        ("export/main.py", "from train.config import f", "export must not import train.config"),
        (
            "mt3_keras/litert.py",
            "from mt3_keras.model import MT3Backbone",
            "loads keras through mt3_keras.litert -> mt3_keras.model",
        ),
        (
            "export/stream.py",
            "from mt3_keras import MT3Backbone",
            "loads keras through export.stream -> mt3_keras.model",
        ),
        (
            "export/streaming.py",
            "def f():\n from mt3_keras import midi",
            "may load pretty_midi through export.streaming -> mt3_keras.midi",
        ),
    ],
)
def test_an_import_against_the_rule_is_found(
    path: str, text: str, fault: str, tmp_path: pathlib.Path
) -> None:
    public = "if TYPE_CHECKING:\n    from mt3_keras.model import MT3Backbone"
    _plant(
        tmp_path,
        {
            "mt3_keras/__init__.py": public,
            "mt3_keras/model.py": "import keras",
            "mt3_keras/midi.py": "import pretty_midi",
        },
    )
    assert not import_faults(tmp_path)
    found = import_faults(_plant(tmp_path, {path: text}))
    assert len(found) == 1
    assert found[0].startswith(path)
    assert fault in found[0]


def test_what_only_a_type_checker_imports_is_free(tmp_path: pathlib.Path) -> None:
    text = "if typing.TYPE_CHECKING:\n    import keras\nelse:\n    import json"
    assert not import_faults(_plant(tmp_path, {"mt3_keras/notes.py": text}))


def test_importing_the_package_loads_neither_keras_nor_tensorflow() -> None:
    code = f"import sys, mt3_keras; print(*sorted({KERAS!r} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, ""), loaded.stderr


def test_bazel_rules_match_the_files_and_their_imports(query: Query) -> None:
    faults = bazel_faults(ROOT, query(ROOT))
    assert not faults, "\n".join(faults)


def test_bazel_rules_that_differ_from_the_tree_are_found(
    query: Query, tmp_path: pathlib.Path
) -> None:
    load = 'load("@rules_python//python:defs.bzl", "py_library", "py_test")\n'
    public = 'package(default_visibility = ["//visibility:public"])\n'
    library = load + public + 'py_library(name = "{}", srcs = glob(["*.py"]), deps = {})\n'
    bazel = {
        name: (ROOT / name).read_text()
        for name in ("WORKSPACE", "MODULE.bazel", "native_rules.bzl")
    }
    sound = bazel | {
        "BUILD": "",
        "mt3_keras/BUILD": library.format("mt3_keras", []),
        "mt3_keras/notes.py": "",
        "train/BUILD": library.format("train", ["//mt3_keras"]),
        "train/config.py": "from mt3_keras import notes",
        "export/BUILD": library.format("export", []),
        "tests/BUILD": load + 'py_test(name = "test_a", srcs = ["test_a.py"])',
        "tests/test_a.py": "",
    }
    wrong = {
        "mt3_keras/BUILD": library.format("mt3_keras", ["//export"]),
        "mt3_keras/datasets/urmp.py": "",
        "train/BUILD": library.format("train", []),
        "train/main.py": 'if __name__ == "__main__":\n    pass',
        "tests/test_b.py": "from train import config",
    }
    assert not bazel_faults(tmp_path, query(_plant(tmp_path, sound)))
    faults = "\n".join(bazel_faults(tmp_path, query(_plant(tmp_path, wrong))))
    for fault in (
        "//mt3_keras:mt3_keras must not depend on //export: mend its deps in mt3_keras/BUILD",
        "mt3_keras/datasets/urmp.py is in no py_library",
        '//train:train: train/config.py imports it, so add "//mt3_keras" to deps',
        "train/main.py is in no py_binary",
        'pytest(\n    name = "test_b",\n    deps = ["//train"],\n)',
    ):
        assert fault in faults
    assert len(faults.split(" is in no ")) == 4


@pytest.mark.parametrize(("one", "other"), [("train", "export"), ("export", "train")])
def test_train_and_export_may_not_depend_on_each_other(
    one: str, other: str, tmp_path: pathlib.Path
) -> None:
    rules = {
        f"//{one}:a": Rule("py_library", [], ["//mt3_keras:m"]),
        "//mt3_keras:m": Rule("py_library", [], [f"//{other}:b"]),
        f"//{other}:b": Rule("py_library", [], []),
    }
    faults = "\n".join(bazel_faults(tmp_path, rules))
    assert f"//{one}:a must not depend on //{other}" in faults
    assert f"//mt3_keras:m must not depend on //{other}" in faults
