"""What every experiment leaves behind: its workdir, its environment, and one headline line. Free of jax at import."""

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from prfaas_jax.errors import InvalidInput

# Packages whose versions decide results.
PACKAGES = (
    *("prfaas_jax", "jax", "jaxlib", "flax", "numba", "numpy", "grpcio", "protobuf", "google-crc32c", "orbax-checkpoint"),
    *("torch", "transformers", "zstandard"),
)

# Environment that changes what the same code does; only these, so nothing secret can slip in.
ENVIRONMENT = (
    *("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "LIBTPU_INIT_ARGS"),
    *("GRPC_EXPERIMENTS", "GLIBC_TUNABLES", "OMP_NUM_THREADS"),
)


def to_json(value: object, indent: int | None = None) -> str:
    """Strict JSON of plain data, dataclasses, numpy scalars and arrays, paths and ConfigDicts; keys keep their order.

    Raises:
        InvalidInput: a NaN or an infinity anywhere, or a type that has no JSON form.
    """
    try:
        return json.dumps(value, default=_plain, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise InvalidInput("result", value, f"plain data with finite numbers ({error})") from error


def headline(result: Mapping[str, Any]) -> None:
    """Prints `result` as one JSON line on stdout and flushes: the last thing that an experiment prints. InvalidInput as `to_json`."""
    line = to_json(dict(result))
    sys.stderr.flush()
    print(line, flush=True)


def environment() -> dict[str, Any]:
    """Where a result was measured: python, platform, cpu, packages, commit, date (UTC), and devices once jax has been imported."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
        "packages": _package_versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "git": _git_commit(),
        "devices": _devices(),
    }


class Workdir:
    """The folder of one run. Files appear whole or not at all, and a finished run is not overwritten by accident."""

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False):
        """Makes the folder. Raises InvalidInput when it has no name, is no folder, or holds a finished run and `overwrite` is False."""
        self.path = Path(path)
        if not os.fspath(path):
            raise InvalidInput("workdir", path, "a folder: an empty name would fill the current one")
        if self.path.exists() and not self.path.is_dir():
            raise InvalidInput("workdir", str(path), "a folder")
        if not overwrite and (self.path / "summary.json").exists():
            raise InvalidInput("workdir", str(path), "a folder without the summary.json of an earlier run")
        self.path.mkdir(parents=True, exist_ok=True)

    def write_env(self) -> Path:
        """Writes `env.json`."""
        return write_env(self.path)

    def write_config(self, config: object) -> Path:
        """Writes `config.json`: a mapping, dataclass or ConfigDict."""
        return self.write_json("config.json", config)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Writes `summary.json`: the mark of a finished run, so write it last."""
        return self.write_json("summary.json", summary)

    def write_requests(self, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes `requests.csv`, one row per request (`write_rows`)."""
        return self.write_rows("requests.csv", rows)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes the csv file `name` in this folder; columns in order of first appearance, missing values empty."""
        rows = list(rows)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        path = self.path / name
        with _atomic(path) as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Writes `text` to the file `name` in this folder."""
        path = self.path / name
        with _atomic(path) as file:
            file.write(text)
        return path

    def write_json(self, name: str, value: object) -> Path:
        """Writes `value` to the file `name` in this folder."""
        return _write_json(self.path / name, value)


def write_env(workdir: str | os.PathLike[str]) -> Path:
    """Writes `environment()` to `<workdir>/env.json`; call it once jax has its devices, if the run uses jax."""
    return _write_json(Path(workdir) / "env.json", environment())


def _command() -> list[str]:
    """What was run; a program of this checkout by its path from the top, which says the same on another machine."""
    program, top = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return [str(program.relative_to(top)) if program.is_relative_to(top) else sys.argv[0], *sys.argv[1:]]


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[TextIO]:
    """Opens a temporary file beside `path` for writing and renames it on success."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: object) -> Path:
    text = to_json(value, indent=2)
    with _atomic(path) as file:
        file.write(text + "\n")
    return path


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> dict[str, Any] | None:
    """Commit of the source tree and whether it was edited; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "edited": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _devices() -> list[dict[str, Any]] | None:
    """Devices by kind, None when jax was never imported: asking must not start an accelerator."""
    if "jax" not in sys.modules:
        return None
    import jax

    return [{"id": d.id, "platform": d.platform, "kind": d.device_kind} for d in jax.devices()]
