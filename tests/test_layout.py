"""Bazel knows every file, and importing the package is cheap.

Which module may import which is stated in pyproject.toml and checked by `make lint`.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_importing_the_package_loads_neither_keras_nor_tensorflow() -> None:
    code = "import sys, mt3_keras; print({'keras', 'tensorflow'} & sys.modules.keys() or '')"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, ""), loaded.stderr


def test_every_python_file_belongs_to_a_bazel_rule(tmp_path: pathlib.Path) -> None:
    bazel = shutil.which("bazel")
    if bazel is None:
        pytest.skip("needs Bazel, for example Debian's bazel-bootstrap")
    if " " in str(ROOT):
        pytest.skip(f"Bazel refuses paths with spaces: {ROOT}")
    answer = subprocess.run(  # --batch leaves no server behind
        [
            bazel,
            "--batch",
            f"--output_user_root={tmp_path}",
            "query",
            'kind("source file", deps(//...))',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    known = {line.lstrip("/").replace(":", "/") for line in answer.stdout.split()}
    folders = ("mt3_keras", "train", "export", "tests", "benchmarks", "examples")
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not files - known
