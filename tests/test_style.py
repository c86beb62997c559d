"""The two formatters, the linter, and the direction in which modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports only modules before it; what stands on one line is independent of each other.
CHAIN = [
    {"errors", "numerics", "layout", "candidates", "lookup"},
    {"passes", "memory", "resources", "config"},
    {"checkpoint", "rope", "quant"},
    {"packing"},
    {"convert", "cpu", "kernel", "options", "tokenizer"},
    {"results", "launch"},
    {"gpu"},
    {"sampler"},
    {"generation", "snapshot"},
    {"engine"},
    {"model"},
    {"__init__"},
    {"shapes", "info", "report"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(CHAIN) for name in names}
# Imported where they are used, because they are optional.
OPTIONAL = {"cupy", "cupy_backends", "jinja2", "readline"}


def imports(tree: ast.Module, package: str) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of a file of `package`."""
    inner = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == package else [base]
            found += [(name, node in inner) for name in names]
    return found


def violations(name: str, source: str) -> list[str]:
    """What module `name` of the package imports against the rules."""
    wrong = []
    for module, inside in imports(ast.parse(source), "ffmini"):
        top, _, rest = module.partition(".")
        if top in ("torch", "transformers"):
            wrong.append(f"{name} imports {top}")
        if inside and top not in OPTIONAL:
            wrong.append(f"{name} imports {module} inside a function")
        target = rest.partition(".")[0]
        if top == "ffmini" and target in RANK and RANK[target] >= RANK[name]:
            wrong.append(f"{name} imports {target}, which is not before it in the chain")
    return wrong


@pytest.mark.parametrize("path", sorted((ROOT / "ffmini").glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    assert path.stem in RANK, f"{path.stem} has no place in the chain"
    assert violations(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("layout", "from .packing import PackedModel"),
        ("cpu", "from ffmini import gpu"),
        ("cpu", "def f():\n    from .numerics import to_bf16"),
        ("cpu", "import torch"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert violations(name, source)


def test_import_needs_no_cupy() -> None:
    program = "import sys; sys.modules['cupy'] = None; import ffmini; print(ffmini.__version__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    program = "import sys, ffmini; assert 'cupy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_clang_format() -> None:
    files = [
        str(path) for folder in ("cuda", "tests/sim") for path in sorted((ROOT / folder).glob("*.[chp]*"))
    ]
    files = [name for name in files if not name.endswith(".py")]
    files += [str(path) for path in sorted((ROOT / "cuda").glob("*.cu"))]
    command = [str(Path(sys.executable).parent / "clang-format"), "--dry-run", "-Werror", *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:2000]
