"""The shape of the tree: who may import what, and that the Bazel files say the same.

`MODULES` is the tree in the order of its data. A new file is declared there, at its place.
"""

from __future__ import annotations

import ast
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Module: packages it may import | packages it may import inside functions only.
# A module of mt3_keras imports only from the rows above its own, `train` and `export` import
# each other never. A row without keras stays without: what it imports does not load keras either.
MODULES = """
mt3_keras
mt3_keras.config
mt3_keras.notes
mt3_keras.codec                 numpy
mt3_keras.midi                  numpy pretty_midi
mt3_keras.note_encoder          numpy
mt3_keras.note_rolls            numpy
mt3_keras.note_decoder          numpy
mt3_keras.segments              numpy
mt3_keras.quiet
mt3_keras.audio                 numpy librosa soundfile soxr
mt3_keras.spectrogram           numpy keras
mt3_keras.layers                numpy keras keras_hub
mt3_keras.grammar               numpy
mt3_keras.heads                 numpy keras
mt3_keras.pointer               numpy keras
mt3_keras.model                 numpy keras keras_hub
mt3_keras.generation            numpy keras | tensorflow jax
mt3_keras.litert                numpy ai_edge_litert
mt3_keras.checkpoints           numpy msgpack
mt3_keras.catalog
mt3_keras.loading               numpy | h5py
mt3_keras.transcriber           numpy tqdm | keras
mt3_keras.metrics               numpy mir_eval
mt3_keras.plots                 numpy matplotlib
mt3_keras.datasets
mt3_keras.datasets.example      numpy soundfile
mt3_keras.datasets.maestro      numpy
mt3_keras.datasets.slakh        numpy yaml
mt3_keras.datasets.cerberus4    numpy yaml
mt3_keras.datasets.musicnet     numpy
mt3_keras.datasets.guitarset    numpy
mt3_keras.datasets.urmp         numpy
mt3_keras.datasets.composer     numpy
mt3_keras.datasets.sounds       numpy soundfile soxr | tinysoundfont
mt3_keras.datasets.additive     numpy
mt3_keras.datasets.phrases      numpy
mt3_keras.datasets.faust        numpy soxr | dawdreamer
mt3_keras.datasets.voice        numpy scipy soundfile soxr | pyworld
mt3_keras.datasets.drum_kits    numpy
mt3_keras.datasets.recordings   numpy scipy soxr
mt3_keras.datasets.augment      numpy pedalboard pyroomacoustics scipy
mt3_keras.datasets.synthetic    numpy
mt3_keras.datasets.records      numpy msgpack array_record
mt3_keras.datasets.shards       numpy msgpack array_record | apache_beam
mt3_keras.datasets.mixture
mt3_keras.datasets.rolls        numpy
mt3_keras.datasets.pipeline     numpy grain absl
mt3_keras.command_line          absl | keras
mt3_keras.__main__              absl tqdm pretty_midi
train
train.config                    absl
train.strategy                  keras | tensorflow
train.objective                 numpy keras
train.optimizers                keras
train.model                     keras | tensorflow
train.feed                      numpy keras | tensorflow
train.resident                  numpy jax
train.state                     numpy keras
train.callbacks                 numpy keras | matplotlib
train.scores                    | tqdm matplotlib pretty_midi
train.history
train.evaluate                  absl | numpy
train.prepare                   absl | tqdm
train.main                      absl | keras tensorflow tensorboardX tqdm
export
export.served_model             keras tensorflow
export.saved_model              numpy keras tensorflow | tensorflow_serving
export.tflite                   numpy keras tensorflow | litert_quantizer ai_edge_litert
export.streaming                numpy
export.serving_client           numpy absl | grpc tensorflow tensorflow_serving
export.stream                   numpy absl | pretty_midi sounddevice soxr
export.main                     absl
"""
FOLDERS = ("mt3_keras", "train", "export")
KERAS = {"keras", "keras_hub", "tensorflow"}
RUNS_ALONE = {"export.streaming": {"numpy", "ai_edge_litert"}}  # on a phone


class Row(NamedTuple):
    at_once: set[str]
    late: set[str]


class Import(NamedTuple):
    """`late`: inside a function, so not done by importing the module."""

    target: str
    line: int
    late: bool


def _rows(text: str) -> dict[str, Row]:
    rows = {}
    for line in text.strip().splitlines():
        at_once, _, late = line.partition("|")
        name, *packages = at_once.split()
        rows[name] = Row(set(packages), set(late.split()))
    return rows


class Tree:
    """The imports of every Python file below a root."""

    def __init__(self, root: pathlib.Path) -> None:
        self.rows = _rows(MODULES)
        self.files = {
            path.relative_to(root).as_posix(): ast.parse(path.read_text())
            for folder in (*FOLDERS, "tests", "benchmarks")
            for path in sorted((root / folder).rglob("*.py"))
        }
        self.names = {_module(path): path for path in self.files}
        self.public = self._public()
        self.imports = {path: self._imports(path) for path in self.files}

    def _public(self) -> dict[str, str]:
        """Public name of the package -> the module it is loaded from when first used."""
        package = self.files.get("mt3_keras/__init__.py", ast.Module([], []))
        blocks = [node for node in package.body if _is_for_checkers(node)]
        return {
            f"mt3_keras.{alias.name}": statement.module or ""
            for block in blocks
            for statement in ast.walk(block)
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
        }

    def _imports(self, path: str) -> list[Import]:
        """What a file imports, by full module name, in the order of its lines."""
        package = path.rsplit("/", 1)[0].split("/")
        found = []
        for node, late in _walk(self.files[path], late=False):
            if isinstance(node, ast.Import):
                found += [Import(alias.name, node.lineno, late) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    full = self.public.get(f"{origin}.{alias.name}", f"{origin}.{alias.name}")
                    known = full in self.rows or full in self.names
                    found.append(Import(full if known else origin, node.lineno, late))
        return found

    def loads(self, module: str, *, late: bool) -> dict[str, list[str]]:
        """Package of others -> the chain of modules by which importing `module` loads it.

        With `late`, whatever any function of these modules may import counts as well.
        """
        chains: dict[str, list[str]] = {}
        seen, waiting = {module}, [[module]]
        while waiting:
            chain = waiting.pop(0)
            for item in self.imports.get(self.names.get(chain[-1], ""), []):
                if item.late and not late:
                    continue
                package = item.target.split(".")[0]
                if package not in FOLDERS:
                    chains.setdefault(package, chain)
                for name in _with_parents(item.target) if package in FOLDERS else []:
                    if name not in seen:
                        seen.add(name)
                        waiting.append([*chain, name])
        return chains

    def folders_imported(self, path: str) -> set[str]:
        """Labels of the folders a file imports from, its own left out."""
        owned = (*FOLDERS, "benchmarks")
        targets = [i.target for i in self.imports[path] if i.target.split(".")[0] in owned]
        # `a.b` lies in the folder a/b if that is a package, else in the folder a.
        homes = {self.names.get(t, t.replace(".", "/") + ".py").rsplit("/", 1)[0] for t in targets}
        return {f"//{home}" for home in homes} - {f"//{path.rsplit('/', 1)[0]}"}


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _is_for_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _walk(node: ast.AST, *, late: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that runs, and whether only a call runs it."""
    yield node, late
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    inner = node.orelse if _is_for_checkers(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in inner:
        yield from _walk(child, late=late)


def import_faults(root: pathlib.Path) -> list[str]:
    """What breaks the rule that `MODULES` states, one line each."""
    tree = Tree(root)
    faults = []
    for module, path in tree.names.items():
        if module.split(".")[0] not in FOLDERS:
            continue
        if module not in tree.rows:
            faults.append(f"{path}: add {module} to MODULES in tests/layout.py, at its place")
            continue
        for item in tree.imports[path]:
            if fault := _fault(module, item, tree.rows):
                faults.append(f"{path}:{item.line}: {fault}")
        faults += _chain_faults(tree, module)
    return faults


def _fault(module: str, item: Import, rows: dict[str, Row]) -> str | None:
    home, package = module.split(".")[0], item.target.split(".")[0]
    if package in sys.stdlib_module_names:
        return None
    if package in ("tests", "benchmarks"):
        return f"{module} must not import {item.target}"
    if package in FOLDERS:
        if package not in (home, "mt3_keras"):
            return f"{home} must not import {item.target}"
        order = list(rows)
        if item.target not in order:
            return f"{item.target} is in no row of MODULES"
        if home == "mt3_keras" and order.index(item.target) >= order.index(module):
            return f"{module} must not import {item.target}, which does not stand above it"
        return None
    row = rows[module]
    if package in row.at_once or (item.late and package in row.late):
        return None
    where = " outside functions" if package in row.late else ""
    return f"{module} must not import {package}{where}"


def _chain_faults(tree: Tree, module: str) -> list[str]:
    path, faults = tree.names[module], []
    if not KERAS & tree.rows[module].at_once:
        for package, chain in tree.loads(module, late=False).items():
            if package in KERAS and len(chain) > 1:
                faults.append(f"{path}: {module} loads {package} through {' -> '.join(chain)}")
    if alone := RUNS_ALONE.get(module):
        for package, chain in tree.loads(module, late=True).items():
            if package not in alone and package not in sys.stdlib_module_names:
                faults.append(f"{path}: {module} may load {package} through {' -> '.join(chain)}")
    return faults


class Rule(NamedTuple):
    kind: str
    srcs: list[str]  # "//folder:file.py"
    deps: list[str]


def bazel_faults(root: pathlib.Path, rules: dict[str, Rule]) -> list[str]:
    """Where the Bazel rules differ from the files and their imports, each with its cure."""
    tree = Tree(root)
    sources = {(rule.kind, src) for rule in rules.values() for src in rule.srcs}
    faults = []
    for path, parsed in tree.files.items():
        folder, file = path.rsplit("/", 1)
        kind, cure = "py_library", f'srcs = glob(["*.py"]) of a py_library in {folder}/BUILD'
        if folder == "tests" and file.startswith("test_"):
            deps = sorted(tree.folders_imported(path))
            kind, cure = "py_test", f"tests/BUILD:\n{_test_entry(file, deps)}"
        elif folder != "tests" and _is_main(file, parsed):
            kind, cure = "py_binary", f"the py_binary rules of {folder}/BUILD"
        elif file == "run_pytest.py":
            kind = "py_test"
        if (kind, f"//{folder}:{file}") not in sources:
            faults.append(f"{path} is in no {kind}: add it to {cure}")
    for label, rule in rules.items():
        faults += _rule_faults(label, rule, rules, tree)
    return faults


def _test_entry(file: str, deps: list[str]) -> str:
    lines = "".join(f'        "{dep}",\n' for dep in deps)
    listed = f'["{deps[0]}"]' if len(deps) == 1 else f"[\n{lines}    ]" if deps else "[]"
    return f'pytest(\n    name = "{file.removesuffix(".py")}",\n    deps = {listed},\n)'


def _is_main(file: str, parsed: ast.Module) -> bool:
    return file == "__main__.py" or any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in parsed.body
    )


def _rule_faults(label: str, rule: Rule, rules: dict[str, Rule], tree: Tree) -> list[str]:
    reached, waiting = {label}, [label]
    while waiting:
        for dep in rules[waiting.pop()].deps:
            if dep in rules and dep not in reached:
                reached.add(dep)
                waiting.append(dep)
    reached_folders = {dep.split(":")[0] for dep in reached}
    home = label.split(":")[0]
    top = home.strip("/").split("/")[0]
    allowed = {"mt3_keras": {"mt3_keras"}, "train": {"mt3_keras", "train"}}
    allowed["export"] = {"mt3_keras", "export"}
    faults = [
        f"{label} must not depend on {folder}: mend its deps in {home[2:]}/BUILD"
        for folder in sorted(reached_folders)
        if top in allowed and folder.strip("/").split("/")[0] not in allowed[top]
    ]
    for src in rule.srcs:
        path = src.removeprefix("//").replace(":", "/")
        if path in tree.files:
            missing = sorted(tree.folders_imported(path) - reached_folders)
            faults += [f'{label}: {path} imports it, so add "{dep}" to deps' for dep in missing]
    return faults
