"""Which implementation serves a call: explicit by `impl=`, else by device; always on record, never changed silently."""

from __future__ import annotations

import warnings

from . import _native

# The order of preference per device; the first that can run is the default.
_PREFERENCE = {"cpu": ("native", "eager"), "cuda": ("eager",), "meta": ("eager",)}
_used: dict[str, str] = {}
_NO_COMPILER = _native.compiler() is None  # looked up once, so that torch.compile sees a constant


def used() -> dict[str, str]:
    """Operator -> implementation of its latest call, e.g. `{"tree_attention": "native"}`; part of a run's record."""
    return dict(_used)


def reset_used() -> None:
    """Forget which implementations were used so far."""
    _used.clear()


def default_impl(op: str, device_type: str) -> str:
    """The implementation that `op` takes on a device when none is named."""
    preference = _PREFERENCE.get(device_type, ("eager",))
    if preference[0] == "native" and _NO_COMPILER:
        _warn_without_compiler()
        return "eager"
    return preference[0]


def choose(op: str, impl: str | None, device_type: str, available: tuple[str, ...]) -> str:
    """Resolve `impl` for a call on a device and put it on record.

    Raises ValueError when `impl` is not one of `available` or cannot run on that device.
    """
    if impl is None:
        impl = default_impl(op, device_type)
    elif impl not in available:
        raise ValueError(f"impl: {op} expected one of {list(available)}, got {impl!r}")
    elif impl == "native" and device_type not in ("cpu", "meta"):
        raise ValueError(f"impl: {op} 'native' runs on cpu, got tensors on {device_type}")
    elif impl == "native" and _NO_COMPILER:
        raise RuntimeError(f"impl: {op} 'native' needs a C++ compiler (g++ or clang++ on PATH, or CXX), none was found")
    _used[op] = impl
    return impl


_warned = False


def _warn_without_compiler() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn("hmlab: no C++ compiler found, so CPU operators run as 'eager' PyTorch (slower); "
                      "install g++ for the native ones", stacklevel=4)
