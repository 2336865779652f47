"""Where the files that travel with the package lie: `notebooks/` and `data/`."""

from pathlib import Path


def assets_root() -> Path:
    """The folder that holds `notebooks/` and `data/`: inside an installed wheel, or the checkout's root.

    Raises `FileNotFoundError` where neither is there.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "_share", package.parent):
        if (root / "data").is_dir() and (root / "notebooks").is_dir():
            return root
    raise FileNotFoundError(f"notebooks/ and data/ should lie in {package / '_share'} or {package.parent}")
