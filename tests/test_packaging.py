import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
EVERYWHERE = ("codegen", "frontends", "passes", "specqd")

# (imported module, folders that may not import it, why)
BANS = [
    ("tvm", ("frontends", "passes"), "passes and frontends work, and are tested, without TVM"),
    ("tvm_ffi", ("frontends", "passes"), "passes and frontends work, and are tested, without TVM"),
    ("transformers", ("codegen", "passes", "specqd"), "after capture nothing depends on transformers"),
    (
        "torch",
        ("specqd/runtime", "specqd/selection", "codegen/kernels"),
        "an artifact runs without torch, and kernels are only TIR",
    ),
    (
        "specqd.codegen",
        ("frontends", "passes"),
        "dependencies point to Program: codegen reads what passes wrote",
    ),
    (
        "specqd.frontends",
        ("codegen", "passes"),
        "dependencies point to Program: any frontend may have made it",
    ),
    ("specqd.passes", ("frontends",), "a frontend captures faithfully; rewriting is the pipeline's"),
]
NAMES_THAT_SAY_NOTHING = {"util", "utils", "helper", "helpers", "manager", "managers", "common", "misc"}


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def package_of(folder: Path) -> str:
    """The import package of a folder in the tree, by the longest entry of the mapping that holds it."""
    package, home = max(
        ((p, f) for p, f in FOLDERS.items() if folder.is_relative_to(ROOT / f)),
        key=lambda entry: len(entry[1]),
    )
    return ".".join((package, *folder.relative_to(ROOT / home).parts))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every absolute module name that a file imports, lazily, for types only, or by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def test_every_package_folder_is_in_the_list():
    folders = {file.parent for file in sources(*FOLDERS.values())}
    assert sorted(package_of(folder) for folder in folders) == sorted(PACKAGES)


def test_every_package_folder_has_an_init():
    folders = {file.parent for file in sources(*FOLDERS.values())}
    assert [f for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_every_dependency_is_pinned_for_make():
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    pins = re.findall(r"(?m)^([\w-]+)==", (ROOT / "constraints.txt").read_text())
    assert {re.split("[<>=]", line)[0] for line in asked} <= set(pins)


def test_import_is_quick_and_light(tmp_path: Path):
    probe = (
        "import json, sys, time; start = time.perf_counter(); import specqd\n"
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-c", probe], cwd=tmp_path, text=True))
        for _ in range(3)
    ]
    assert {"torch", "transformers", "tvm"}.isdisjoint(runs[0][1])
    assert min(seconds for seconds, _ in runs) < 1.0


@pytest.mark.parametrize(
    ("module", "folders", "why"), BANS, ids=[f"{m}-in-{'-'.join(f)}" for m, f, _ in BANS]
)
def test_no_banned_import(module: str, folders: tuple[str, ...], why: str):
    found = [
        str(file.relative_to(ROOT))
        for file in sources(*folders)
        if any(f"{name}.".startswith(f"{module}.") for name in imports(ast.parse(file.read_text())))
    ]
    assert found == [], f"{module} is imported here, but {why}"


@pytest.mark.parametrize(
    "line",
    [
        "import tvm.tir",
        "from tvm import relax",
        "def f():\n    import tvm",
        "importlib.import_module('tvm.runtime')",
    ],
)
def test_imports_are_seen_in_every_form(line: str):
    assert [name.partition(".")[0] for name in imports(ast.parse(line)) if name.startswith("tvm")] == ["tvm"]


def test_source_files_stay_short():
    lengths = {
        file: len(file.read_text().splitlines()) for file in sources(*EVERYWHERE, "benchmarks", "examples")
    }
    assert {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > 300} == {}


def test_names_say_something():
    files = sources(*EVERYWHERE, "benchmarks", "examples", "tests")
    words = {file: set(re.split(r"[/_.]", str(file.relative_to(ROOT)))) for file in files}
    assert [str(file) for file, found in words.items() if found & NAMES_THAT_SAY_NOTHING] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that no build folder is left in the tree, or read from it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    for folder in EVERYWHERE:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(out),
        str(tree),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: Path):
    files = [
        p for f in EVERYWHERE for p in (ROOT / f).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    expected = {f"{package_of(file.parent).replace('.', '/')}/{file.name}" for file in files}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


def test_an_installed_wheel_leaks_no_top_level_package(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    probe = (
        "import importlib.util, json, specqd, specqd.passes.kv\n"
        f"leaks = [name for name in {EVERYWHERE[:-1]} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([leaks, specqd.__file__, specqd.passes.kv.__file__]))"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", probe], cwd=tmp_path, text=True, env={**os.environ, "PYTHONPATH": str(site)}
    )
    homes = [str(site / "specqd" / "__init__.py"), str(site / "specqd" / "passes" / "kv" / "__init__.py")]
    assert json.loads(printed) == [[], *homes]
