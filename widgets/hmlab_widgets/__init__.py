"""Views and dashboards: a Dataset goes in, a selection comes out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .explorer import TreeExplorer

__all__ = ["TreeExplorer"]


def __getattr__(name: str):
    # The servers import this package too, and need no figures.
    if name == "TreeExplorer":
        from .explorer import TreeExplorer

        return TreeExplorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
