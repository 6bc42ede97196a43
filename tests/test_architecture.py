"""Imports point one way, heavy libraries load only where they are used, and `--help` costs nothing (design.md)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import what stands on its own line or above; nothing may import in a circle. What is not named here,
# resolve, formats and checkpoint among them, stands on the empty line.
LEVELS: tuple[set[str], ...] = (
    {"dora_serve", "dora_serve.errors", "dora_serve.progress"},
    {"dora_serve.adapter", "dora_serve.ops", "dora_serve.safetensors_file"},
    set(),
    {
        "dora_serve.engine",
        "dora_serve.onnx_engine",
        "dora_serve.merge",
        "dora_serve.pipeline_verify",
        "dora_serve.verify",
    },
    {"dora_serve.cli", "dora_serve.vllm_plugin"},
    {"exporters"},
    {"app"},
)

# Besides the levels: (importer, imported, why not).
NEVER = (
    ("dora_serve.merge", "dora_serve.engine", "a merge serves nobody"),
    ("dora_serve.engine", "dora_serve.merge", "an engine writes nothing"),
    ("dora_serve.reference", "dora_serve.ops", "the verifier's forward is independent of the code that merged"),
    ("dora_serve.reference", "dora_serve.merge", "the verifier's forward is independent of the code that merged"),
    ("dora_serve.verify", "dora_serve.quantized.decode", "the verifier decodes by itself"),
    ("dora_serve.verify", "dora_serve.ops", "what merged cannot also be the judge"),
    ("dora_serve.verify", "dora_serve.merge", "what merged cannot also be the judge"),
)

ONLY_WHERE_USED = {
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "gguf",
    "gradio",
    "huggingface_hub",
    "httpx2",
    "onnx",
    "onnxruntime",
}
ONLY_WHERE_USED |= {"matplotlib", "onnx_ir", "onnxscript", "peft", "transformers", "vllm"}


def _modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    modules = {}
    for package in ("dora_serve", "exporters", "app"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = _modules()


def _nodes(parent: ast.AST, *, at_import_time: bool) -> Iterator[ast.AST]:
    """Every node below `parent`; at_import_time leaves out functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(parent):
        if at_import_time:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                continue
        yield node
        yield from _nodes(node, at_import_time=at_import_time)


def _imports(source: str, package: str, *, at_import_time: bool = False) -> set[str]:
    """The dotted names that `source`, a module in `package`, imports."""
    names = set()
    for node in _nodes(ast.parse(source), at_import_time=at_import_time):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            # `from package import name` may name a module.
            parts = {f"{origin}.{alias.name}" for alias in node.names}
            names |= (parts & MODULES.keys()) or {origin}
    return names


def _imports_of(module: str, *, at_import_time: bool = False) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _imports(path.read_text(encoding="utf-8"), package, at_import_time=at_import_time)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _level(module: str) -> int:
    parts = module.split(".")
    part = ".".join(parts[:2]) if parts[0] == "dora_serve" else parts[0]
    return next((number for number, level in enumerate(LEVELS) if part in level), LEVELS.index(set()))


GRAPH = {module: {name for name in _imports_of(module) if name in MODULES and name != module} for module in MODULES}


def _reachable(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in GRAPH[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {name}" for module, names in GRAPH.items() for name in names if _level(module) < _level(name)
    ]
    assert not wrong


def test_nothing_imports_in_a_circle() -> None:
    assert not [module for module in MODULES if module in _reachable(module)]


@pytest.mark.parametrize(("importer", "imported", "why"), NEVER)
def test_what_must_stay_apart_does(importer: str, imported: str, why: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        if _within(module, importer)
        for name in names
        if _within(name, imported)
    ]
    assert not wrong, why


def test_of_the_app_the_export_tab_alone_reaches_the_exporters() -> None:
    wrong = [
        module
        for module, names in GRAPH.items()
        if _within(module, "app")
        for name in names
        if _within(name, "exporters")
    ]
    assert set(wrong) == {"app.export_tab"}


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{module} imports {name} at its top"
        for module in MODULES
        for name in _imports_of(module, at_import_time=True)
        if name.partition(".")[0] in ONLY_WHERE_USED
    ]
    assert not wrong


def test_the_reader_of_imports_sees_each_kind() -> None:
    source = """
import onnx
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import gradio
try:
    import peft
except ImportError:
    import vllm
class A:
    import gguf
def f():
    import transformers
from . import errors
from .progress import Progress
"""
    early = _imports(source, "dora_serve", at_import_time=True)
    assert early == {"onnx", "typing", "peft", "vllm", "gguf", "dora_serve.errors", "dora_serve.progress"}
    assert _imports(source, "dora_serve") == early | {"gradio", "transformers"}
    assert _imports("from ..errors import AdapterError", "dora_serve.formats") == {"dora_serve.errors"}


def _python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)


EXPORT_COMMANDS = ("", "convert", "merge", "onnx-adapter", "verify", "inspect", "push", "demo-base")
COMMANDS = [("exporters.cli", command) for command in EXPORT_COMMANDS]
COMMANDS += [("dora_serve.cli", command) for command in ("", "generate", "app", "vllm")]


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_help_loads_nothing_heavy(module: str, command: str) -> None:
    arguments = [*command.split(), "--help"]
    run = _python(f"""
import json, sys
from {module} import main
sys.argv = ["program", *{arguments!r}]
try:
    status = main()
except SystemExit as stop:
    status = stop.code
print()
print(json.dumps([status, sorted(sys.modules)]))
""")
    assert run.returncode == 0, run.stderr
    usage, _, last = run.stdout.rstrip().rpartition("\n")
    status, loaded = json.loads(last)
    assert not status
    assert "usage" in usage.lower()
    assert not {"torch", "numpy", "safetensors", *ONLY_WHERE_USED} & set(loaded)


def test_every_module_imports_without_the_optional_libraries() -> None:
    absent = sorted(ONLY_WHERE_USED - {"huggingface_hub", "httpx2"})
    run = _python(f"""
import importlib, sys, traceback
sys.modules.update(dict.fromkeys({absent!r}))
for name in {sorted(MODULES)!r}:
    try:
        importlib.import_module(name)
    except BaseException:
        traceback.print_exc()
""")
    assert run.returncode == 0
    assert run.stderr == ""
