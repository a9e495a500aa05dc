"""Where things live: the project's folder, the data root, and the notebooks."""

import os
from pathlib import Path

from satlib.errors import SatlibError


def project_root() -> Path:
    """Folder that holds `notebooks/`, `data/` and `figures/`: `SATLIB_HOME`, else this checkout, else here."""
    if home := os.environ.get("SATLIB_HOME"):
        return Path(home).resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def data_root() -> Path:
    """Folder of the data sets: the environment variable `SATLIB_DATA`, else `<project>/data`."""
    return Path(os.environ.get("SATLIB_DATA") or project_root() / "data").resolve()


def cards_root() -> Path:
    """Folder of the cards that were saved: `<project>/data/cards`."""
    return project_root() / "data" / "cards"


def views_root() -> Path:
    """Folder of the explorer's views that were kept: `<project>/data/views`."""
    return project_root() / "data" / "views"


def named_file(text: str) -> Path:
    """The file that a setting names: from the project's root if relative, with `~` for the user's home."""
    return project_root() / Path(text).expanduser()


def notebook_paths() -> dict[str, Path]:
    """All notebooks by stem (`04_cifar10`), in order. Raises `SatlibError` where there are none."""
    folder = project_root() / "notebooks"
    paths = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not paths:
        raise SatlibError(f"no notebooks (NN_name.ipynb) in {folder}; set SATLIB_HOME to the project's folder")
    return paths


def select_notebooks(only: str | None) -> dict[str, Path]:
    """The notebooks named in `only` ("04,06", numbers or full stems), in order; all of them for None.

    Raises `SatlibError` for a notebook that does not exist, and for an empty selection.
    """
    paths = notebook_paths()
    words = list(paths) if only is None else [word.strip() for word in only.split(",")]
    for word in words:
        if not any(word and word in (stem, stem[:2]) for stem in paths):
            raise SatlibError(f"unknown notebook {word!r}; --only takes numbers or names of {', '.join(paths)}")
    return {stem: path for stem, path in paths.items() if stem in words or stem[:2] in words}
