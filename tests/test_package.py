"""The package as it is installed: its parts, its requirements, its answer where one is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mt3_keras import __version__, extras
from mt3_keras.midi import read_midi
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# File of pins -> the extras it pins; requirements.txt pins the package's own dependencies as well.
FILES = {
    "requirements.txt": "keras",
    "requirements-archives.txt": "archives",
    "requirements-spark.txt": "spark",
    "requirements-train.txt": "train",
    "requirements-serving.txt": "serving",
    "requirements-score.txt": "score",
    "requirements-dev.txt": "dev",
    "requirements-docs.txt": "docs",
}


def ranges_of(extra: str) -> dict[str, Requirement]:
    """Names of an extra's own packages -> their ranges; other extras it includes left out."""
    lines = [*EXTRAS[extra], *(PROJECT["dependencies"] if extra == "keras" else [])]
    ranges = {str(canonicalize_name(r.name)): r for r in map(Requirement, lines)}
    ranges.pop(PROJECT["name"], None)
    return ranges


def pins_of(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text()
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in found}


@pytest.mark.parametrize(("file", "extra"), FILES.items())
def test_every_pin_is_in_the_range_of_its_extra_and_every_package_is_pinned(file, extra):
    pins, ranges = pins_of(file), ranges_of(extra)
    assert pins.keys() == ranges.keys()
    outside = [name for name, pin in pins.items() if not ranges[name].specifier.contains(pin)]
    assert not outside


def test_a_package_has_one_pin_in_all_files():
    pins = {pin for file in FILES for pin in pins_of(file).items()}
    assert len(pins) == len({name for name, _ in pins})


def test_every_requirements_file_is_compared_but_those_of_other_environments():
    # What requirements-fonts.txt lists is installed without dependencies, which no extra can say;
    # tensorflow-io needs an older TensorFlow than any extra.
    assert {path.name for path in ROOT.glob("requirements*.txt")} == {
        *FILES,
        "requirements-fonts.txt",
        "requirements-tfio.txt",
    }


def test_names_to_import_are_of_the_extra_that_is_said_to_bring_them():
    distributions = importlib.metadata.packages_distributions()
    for extra, packages in extras.PACKAGES.items():
        for package in packages:
            names = {canonicalize_name(name) for name in distributions.get(package, [])}
            if names:  # installed here
                assert names & ranges_of(extra).keys(), package


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel that `pip wheel .` builds of the files under version control."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout: what else lies in the folder is unknown")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, folder / "source"], check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"mt3_keras-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"mt3_keras-{__version__}.dist-info/entry_points.txt")
    information = {name for name in names if name.startswith(f"mt3_keras-{__version__}.dist-info/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mt3_keras").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "BUILD"
    }
    assert names - information == files
    assert {"mt3_keras/py.typed", "mt3_keras/presets/small/model.tflite"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in information)
    assert b"mt3 = mt3_keras.__main__:main" in entry_points


@pytest.mark.install
def test_an_installed_light_core_transcribes_in_another_folder(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [venv / "bin" / "python", "-m", "pip", "install", "-q", "-c", "requirements.txt"]
    done = subprocess.run([*install, wheel], cwd=ROOT, capture_output=True, text=True, timeout=600)
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"needs a package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def mt3(*arguments):
        command = [venv / "bin" / "mt3", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    transcribed = mt3("transcribe", ROOT / "examples" / "band.flac", "--formats", "mid,png")
    assert (transcribed.returncode, transcribed.stderr) == (0, "")
    written = tmp_path / "out" / "band.mid"
    assert written.exists()
    scored = mt3("evaluate", "--reference", ROOT / "examples" / "band.mid", "--estimate", written)
    assert scored.returncode == 0
    assert "Onset F1" in scored.stdout
    installed = {path.name for path in venv.rglob("site-packages/*")}
    assert not installed & {"keras", "tensorflow", "jax", "librosa"}
    refused = mt3("transcribe", ROOT / "examples" / "band.flac", "--engine", "keras")
    assert refused.returncode == 3
    assert refused.stderr == "mt3: the package keras is missing: pip install 'mt3-keras[keras]'\n"


# --- optional packages that are missing, in this process ---


BLOCKER = """
import importlib.util, runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
sys.argv[:3] = [sys.argv[2]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""


def run_without(packages, module, *arguments, **variables):
    """Runs `python -m module` with packages blocked; returns (exit code, lines of stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, packages, module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.strip().splitlines()


HEAVY = (
    "verovio,cairosvg,pypdf,keras,keras_hub,tensorflow,jax,librosa,h5py,msgpack,litert_quantizer,"
    "grain,array_record"
)


@pytest.mark.parametrize(
    "arguments",
    [["--engine", "keras"], ["--exact"], ["--search", "beam1"], ["--log_floor", "clamp"]],
)
def test_what_needs_keras_says_so_in_one_line_before_any_work(tmp_path, arguments):
    arguments = ["transcribe", "examples/band.flac", "--output_dir", tmp_path, *arguments]
    code, lines = run_without(HEAVY, "mt3_keras", *arguments)
    assert code == 3
    assert lines == ["mt3: the package keras is missing: pip install 'mt3-keras[keras]'"]
    assert not list(tmp_path.iterdir())


def test_official_weights_without_keras_say_so_before_they_are_read(tmp_path):
    (tmp_path / "t5x").mkdir()
    (tmp_path / "t5x" / "checkpoint").write_bytes(b"unread")
    arguments = ["transcribe", "examples/band.flac", "--model", tmp_path / "t5x"]
    code, lines = run_without(HEAVY, "mt3_keras", *arguments, "--output_dir", tmp_path / "out")
    assert code == 3
    assert lines == ["mt3: the package keras is missing: pip install 'mt3-keras[keras]'"]


@pytest.mark.parametrize(("name", "package"), [("svg", "verovio"), ("pdf", "cairosvg")])
def test_engraved_scores_name_their_extra_before_any_work(tmp_path, name, package):
    arguments = ["transcribe", "examples/band.flac", "--output_dir", tmp_path, "--formats", name]
    code, lines = run_without(package, "mt3_keras", *arguments)
    assert code == 3
    assert lines == [f"mt3: the package {package} is missing: pip install 'mt3-keras[score]'"]
    assert not list(tmp_path.iterdir())


def test_the_shipped_model_needs_no_optional_package(tmp_path):
    arguments = ["transcribe", "examples/band.flac", "--output_dir", tmp_path, "--noprogress"]
    code, lines = run_without(HEAVY, "mt3_keras", *arguments, "--formats", "mid,json,png")
    assert (code, lines) == (0, [])
    assert json.loads((tmp_path / "band.json").read_text())["notes"]


@pytest.mark.parametrize(
    ("module", "arguments", "package", "extra"),
    [
        ("train.main", ["--data=none", "--out_dir=none"], "grain", "train"),
        ("train.main", ["--data=none", "--out_dir=none"], "array_record", "train"),
        ("train.prepare", ["--dataset=maestro", "--root=x", "--list"], "array_record", "train"),
        ("train.evaluate", ["--dataset=maestro", "--root=x"], "array_record", "train"),
        ("train.prepare", ["--dataset=maestro", "--root=x"], "apache_beam", "archives"),
        ("export.main", ["--out_dir=none"], "keras_hub", "keras"),
        ("export.main", ["--out_dir=none"], "tensorflow_serving", "serving"),
    ],
)
def test_applications_name_the_extra_that_is_missing(module, arguments, package, extra):
    code, lines = run_without(package, module, *arguments)
    assert code == 3
    assert lines == [
        f"{module}: the package {package} is missing: pip install 'mt3-keras[{extra}]'"
    ]
    assert not (ROOT / "none").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg to make an M4A file")
def test_recordings_of_phones_are_read_where_no_ffmpeg_is_installed(tmp_path):
    path = tmp_path / "memo.m4a"
    make = ["ffmpeg", "-v", "error", "-i", ROOT / "examples" / "piano.flac", "-t", "3", path]
    subprocess.run(make, check=True)
    arguments = ["transcribe", path, "--output_dir", tmp_path / "out", "--noprogress"]
    assert run_without("keras", "mt3_keras", *arguments, PATH=str(tmp_path)) == (0, [])
    assert read_midi(tmp_path / "out" / "memo.mid")


@pytest.mark.parametrize(
    ("argument", "package", "extra"),
    [("--runner=DaskRunner", "distributed", "archives"), ("--engine=keras", "keras", "keras")],
)
def test_archives_name_the_extra_that_is_missing_before_any_work(
    tmp_path, argument, package, extra
):
    pytest.importorskip("apache_beam")
    arguments = ["archive", "examples/band.flac", f"--output_dir={tmp_path / 'out'}", argument]
    code, lines = run_without(package, "mt3_keras", *arguments)
    assert code == 3
    assert lines == [f"mt3: the package {package} is missing: pip install 'mt3-keras[{extra}]'"]
    assert not list(tmp_path.iterdir())


def test_formats_that_need_ffmpeg_say_so_and_the_rest_is_transcribed(tmp_path):
    shutil.copy(ROOT / "examples" / "piano.flac", tmp_path / "a.flac")
    (tmp_path / "b.m4a").write_bytes(b"unread")
    arguments = ["transcribe", tmp_path, "--output_dir", tmp_path / "out", "--noprogress"]
    code, lines = run_without("imageio_ffmpeg", "mt3_keras", *arguments, PATH=str(tmp_path))
    assert code == 1
    assert lines[0].startswith(f"mt3: {tmp_path}/b.m4a: ") and "imageio-ffmpeg" in lines[0]
    assert lines[1:] == ["mt3: 1 of 2 recordings failed"]
    assert (tmp_path / "out" / "a.mid").exists()


@pytest.mark.parametrize("place", ["KERAS_BACKEND=torch", "keras.json"])
def test_another_projects_backend_is_named_and_concerns_keras_alone(tmp_path, place):
    variables = {"KERAS_HOME": str(tmp_path)}
    if place == "keras.json":
        (tmp_path / "keras.json").write_text('{"backend": "torch"}')
        variables["KERAS_BACKEND"] = ""
    else:
        variables["KERAS_BACKEND"] = "torch"
    arguments = ["transcribe", "examples/piano.flac", "--output_dir", tmp_path / "out"]
    code, lines = run_without("torch", "mt3_keras", *arguments, "--engine=keras", **variables)
    assert (code, len(lines)) == (1, 1)
    assert place in lines[0]
    assert "KERAS_BACKEND=tensorflow" in lines[0]
    code, lines = run_without("torch", "mt3_keras", *arguments, "--noprogress", **variables)
    assert (code, lines) == (0, [])


def test_other_failed_imports_are_no_missing_extra():
    assert extras.explain_import_error(ImportError("no name", name="mt3_keras.nowhere")) is None
    assert extras.explain_import_error(ImportError("broken", name="numpy")) is None
