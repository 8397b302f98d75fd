"""The rules of the house: who may import whom, what must not need jax, how long a file may get."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("prfaas_jax", "experiments", "configs")

# Top floor first; a module imports only from its own floor and from floors below it.
FLOORS = (
    "experiments",
    "configs",
    "prfaas_jax.testing",
    "prfaas_jax.serving",
    "prfaas_jax.simulation",
    "prfaas_jax.engine",
    "prfaas_jax.transfer",
    "prfaas_jax.scheduling",
    "prfaas_jax.models",
    "prfaas_jax.ops",
    "prfaas_jax.kvcache",
    "prfaas_jax.sharding",
    "prfaas_jax.results",
    "prfaas_jax.errors",
)

# Planning a cluster and moving bytes need no accelerator stack.
NO_JAX = (
    "configs",
    "prfaas_jax.errors",
    "prfaas_jax.results",
    "prfaas_jax.scheduling",
    "prfaas_jax.simulation",
    "prfaas_jax.transfer",
    "prfaas_jax.models.config",
    "prfaas_jax.kvcache.spec",
    "prfaas_jax.kvcache.segments",
    "prfaas_jax.kvcache.pages",
    "prfaas_jax.engine.api",
)

MAX_LINES = 450


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "_pb2" not in p.name)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> str | None:
    """The floor that a module lives on; None for the bare root package."""
    return next((f for f in FLOORS if module == f or module.startswith(f + ".")), None)


def imported(path: Path) -> set[str]:
    """Full names of everything that a file imports from our packages, inside functions too."""
    names: set[str] = set()
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from prfaas_jax import engine` imports prfaas_jax.engine
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] in PACKAGES}


def violations(path: Path) -> list[str]:
    here = floor(module_name(path))
    if here is None:
        return [f"{module_name(path)} imports {name}: the root package imports nothing" for name in sorted(imported(path))]
    return [
        f"{module_name(path)} ({here}) imports {name}, which is on a floor above or unknown"
        for name in sorted(imported(path))
        if (there := floor(name)) is None or FLOORS.index(there) < FLOORS.index(here)
    ]


def test_every_module_has_a_floor():
    assert not [m for m in map(module_name, sources(*PACKAGES)) if floor(m) is None and m != "prfaas_jax"]


def test_packages_import_only_from_floors_below():
    found = [v for path in sources(*PACKAGES) for v in violations(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from prfaas_jax.engine.api import Job", True),
        ("import prfaas_jax.serving.router", True),
        ("from prfaas_jax import engine", True),
        ("from ..engine import api", True),
        ("def f():\n    import configs.models", True),
        ("from prfaas_jax import *", True),
        ("from prfaas_jax.kvcache import pages", False),
        ("from . import policies", False),
        ("import prfaas_jax.errors, os", False),
    ],
)
def test_the_check_sees_every_form_of_import(line, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "prfaas_jax" / "scheduling" / "example.py"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert bool(violations(path)) == wrong


def test_pure_modules_do_not_load_jax():
    modules = [m for m in map(module_name, sources(*PACKAGES)) if any(m == pure or m.startswith(pure + ".") for pure in NO_JAX)]
    assert {pure for pure in NO_JAX if not any(m == pure or m.startswith(pure + ".") for m in modules)} == set()
    code = (
        "import importlib, json, sys\n"
        "guilty = {}\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = [m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules]\n"
        "    if heavy:\n"
        "        guilty[name] = heavy\n"
        "        break\n"
        "print(json.dumps(guilty))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources(*PACKAGES, "tests")}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}
