"""One file per profile: `get_config()` returns the form that `prfaas_jax.scheduling.profile_files` reads."""

import importlib.util
from pathlib import Path
from typing import Any

from prfaas_jax.errors import InvalidInput
from prfaas_jax.scheduling.profile_files import instance_from_dict, read_profile
from prfaas_jax.scheduling.profiles import Instance

_HERE = Path(__file__).parent


def available_profiles() -> tuple[str, ...]:
    """Names of the profiles in this folder."""
    return tuple(sorted(p.stem for p in _HERE.glob("*.py") if p.stem != "__init__"))


def load_profile(name_or_path: str, **options: Any) -> Instance:
    """A profile by name ("h200_paper_1t"), by path of a file with `get_config()`, or a JSON file as `read_profile` takes them.

    Args:
        name_or_path: see above.
        options: of `read_profile` for JSON files (`efficiency`, `model`); for all, fields of the profile form that replace the file's.

    Raises:
        InvalidInput: no such profile, a file without `get_config()`, or what makes no profile.
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        return read_profile(path, **options)
    if path.suffix != ".py" or not path.is_file():
        path = _HERE / f"{path.stem}.py"
        if name_or_path not in (path.stem, f"configs/profiles/{path.name}") or path.stem not in available_profiles():
            known = f"a .py file with get_config(), a .json file or one of {', '.join(available_profiles())}"
            raise InvalidInput("profile", name_or_path, known)
    spec = importlib.util.spec_from_file_location(f"_profile_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # path ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InvalidInput("profile", name_or_path, "a file that defines get_config()")
    return instance_from_dict({**module.get_config().to_dict(), **options})
