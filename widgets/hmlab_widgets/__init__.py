"""Views and dashboards: a Dataset goes in, a selection comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explorer import TreeExplorer
    from .live import LiveFigure

__all__ = ["LiveFigure", "TreeExplorer"]

_MODULES = {"LiveFigure": ".live", "TreeExplorer": ".explorer"}


def __getattr__(name: str) -> Any:
    # The servers import this package too, and need no figures.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
