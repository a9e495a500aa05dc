"""Where things live: the project's folder, the data root, and the ledger's two homes."""

import os
from pathlib import Path


def project_root() -> Path:
    """Folder that holds `notebooks/`, `data/` and `figures/`: `SATLIB_HOME`, else this checkout, else here."""
    if home := os.environ.get("SATLIB_HOME"):
        return Path(home).resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def data_root() -> Path:
    """Folder of the data sets: the environment variable `SATLIB_DATA`, else `<project>/data`."""
    return Path(os.environ.get("SATLIB_DATA") or project_root() / "data").resolve()


def named_file(text: str) -> Path:
    """The file that a setting names: from the project's root if relative, with `~` for the user's home."""
    return project_root() / Path(text).expanduser()
