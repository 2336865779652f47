"""The only way anybody looks inside a memory: memories `observe`, a `record` collects, a Dataset comes out.

    with record(model) as recording:
        model(tokens)
    recording.dataset()          # xarray.Dataset, dims layer, batch, time, ...

A memory calls `observe(name, value, dims)` wherever it has something to show. That is a no-op unless a
recording is on, and the value may be a callable, so that nothing is computed when nobody looks. The recorder
adds the `layer` dimension and the position on the `time` axis: calls that follow one another (chunks, single
steps) are joined into one axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What the common observations are called, and in which units; figures take their axis titles from here.
VOCABULARY: dict[str, tuple[str, str]] = {
    "attention": ("attention weight", "1"),
    "span_start": ("first token summarised", "tokens"),
    "span_end": ("end of the tokens summarised", "tokens"),
    "node_norm": ("norm of the summary", "1"),
    "retrieval_index": ("retrieved slot", "1"),
    "retrieval_score": ("retrieval score", "1"),
    "recall_weight": ("recall weight", "1"),
    "confidence": ("confidence", "1"),
    "density_bits": ("information density", "bits"),
    "ratio": ("compression ratio", "1"),
    "bucket": ("bucket", "1"),
    "hit_share": ("share of attention mass", "1"),
    "tier": ("tier", "1"),
    "state_norm": ("norm of the state", "1"),
    "gate": ("gate", "1"),
    "provenance": ("source", "1"),
}

Coordinates = Mapping[str, tuple[str, Sequence[Any] | Tensor]]


@dataclass
class _Observation:
    layer: int
    start: int
    dims: tuple[str, ...]
    value: np.ndarray
    coords: dict[str, tuple[str, np.ndarray]]


@dataclass
class Recording:
    """What was observed. `names` limits it (None: everything); `start` is the position of the first token."""

    names: frozenset[str] | None = None
    start: int = 0
    layers: dict[int, str] = field(default_factory=dict)
    _seen: dict[str, list[_Observation]] = field(default_factory=dict)
    _units: dict[str, str] = field(default_factory=dict)
    _layer_of: dict[int, int] = field(default_factory=dict)  # by the module's id
    _consumed: dict[int, int] = field(default_factory=dict)
    _scope: tuple[int, int, int] | None = None  # layer, start, tokens of the call under way

    @property
    def names_seen(self) -> tuple[str, ...]:
        """What was observed so far."""
        return tuple(self._seen)

    def wants(self, name: str) -> bool:
        return self.names is None or name in self.names

    @contextmanager
    def _call(self, module: Any, tokens: int) -> Iterator[None]:
        """The time in which `module` reads `tokens` tokens."""
        layer, outer = self._layer_of.get(id(module)), self._scope
        if layer is None:  # of another model, which nobody records
            token = _active.set(None)
            try:
                yield
            finally:
                _active.reset(token)
        elif outer is not None and outer[0] == layer:  # a step that is written as a forward of one token
            yield
        else:
            start = self._consumed.get(layer, self.start)
            self._scope = (layer, start, tokens)
            try:
                yield
            finally:
                self._scope = outer
            self._consumed[layer] = start + tokens

    def _take(self, name: str, value: Tensor, dims: tuple[str, ...], units: str, coords: Coordinates) -> None:
        layer, start, tokens = self._scope if self._scope is not None else (0, self.start, 1)
        if not tokens:
            return
        if value.ndim != len(dims):
            raise ValueError(f"observe({name!r}): dims {dims} name {len(dims)} axes, the value has {value.ndim}")
        # Copied: later in-place changes of the tensor must not reach what was recorded.
        array = value.detach().to("cpu", torch.float32 if value.is_floating_point() else None, copy=True).numpy()
        if "time" not in dims:
            # A reading of the whole call is placed at the call's last token.
            dims, array, start = ("time", *dims), array[None], start + tokens - 1
        extra = {key: (dim, np.asarray(values)) for key, (dim, values) in coords.items()}
        self._seen.setdefault(name, []).append(_Observation(layer, start, dims, array, extra))
        self._units[name] = units or VOCABULARY.get(name, ("", ""))[1]

    def clear(self) -> None:
        """Forget everything observed so far; the time axis begins at `start` again."""
        self._seen.clear()
        self._consumed.clear()

    def dataset(self):
        """All observations as one `xarray.Dataset`; what was not observed at a place is NaN (integers: -1)."""
        import xarray as xr

        if not self._seen:
            raise RuntimeError("recording: nothing was observed (a compiled module does not observe)")
        arrays = {name: self._join(name, seen) for name, seen in self._seen.items()}
        fill = {name: _fill(array.dtype) for name, array in arrays.items()}
        dataset = xr.merge(arrays.values(), join="outer", fill_value=fill, compat="no_conflicts")
        memories = [self.layers.get(int(layer), "") for layer in dataset["layer"].values]
        dataset = dataset.assign_coords(memory=("layer", memories))
        dataset.attrs.clear()  # those of one variable
        dataset["time"].attrs.update(long_name="position", units="tokens")
        return dataset

    def _join(self, name: str, seen: list[_Observation]):
        import xarray as xr

        dims = seen[0].dims
        for o in seen:
            if o.dims != dims:
                raise ValueError(f"observe({name!r}): dims changed from {dims} to {o.dims}")
        layers = sorted({o.layer for o in seen})
        axis = dims.index("time")
        first = min(o.start for o in seen)
        times = sorted({t for o in seen for t in range(o.start, o.start + o.value.shape[axis])})
        # Dense in time unless readings are sparse (one per call); then only the positions that were read.
        place = {t: i for i, t in enumerate(times)} if len(times) != times[-1] - first + 1 else None
        shape = [max(o.value.shape[a] for o in seen) for a in range(len(dims))]
        shape[axis] = len(times)
        dtype = np.result_type(*(o.value.dtype for o in seen))
        if dtype.kind in "bu":  # room for -1
            dtype = np.promote_types(dtype, np.int8)
        joined = np.full((len(layers), *shape), _fill(dtype), dtype=dtype)
        coords: dict[str, tuple[str, np.ndarray]] = {}
        for o in seen:
            index: list[Any] = [slice(0, n) for n in o.value.shape]
            at = o.start - first if place is None else place[o.start]
            index[axis] = slice(at, at + o.value.shape[axis])
            joined[(layers.index(o.layer), *index)] = o.value
            for key, (dim, values) in o.coords.items():
                known = coords.get(key, (dim, values[:0]))[1]
                if not np.array_equal(known[: len(values)], values[: len(known)]):
                    raise ValueError(f"observe({name!r}): coordinate {key!r} changed from {known} to {values}; "
                                     "what differs between calls or layers is an observation of its own")
                coords[key] = (dim, max(known, values, key=len))
        sizes = dict(zip(dims, shape, strict=True))
        axes = {dim: (dim, np.arange(n)) for dim, n in sizes.items() if dim != "time"}
        long_name = VOCABULARY.get(name, (name.replace("_", " "), ""))[0]
        return xr.DataArray(
            joined, dims=("layer", *dims), name=name, attrs={"long_name": long_name, "units": self._units[name]},
            coords={"layer": layers, "time": times, **axes, **coords},
        )  # fmt: skip


_active: ContextVar[Recording | None] = ContextVar("hmlab_recording", default=None)


def _fill(dtype: np.dtype) -> float | int:
    return np.nan if np.issubdtype(dtype, np.floating) else -1


def observe(name: str, value: Tensor | Callable[[], Tensor], dims: tuple[str, ...], *, units: str = "",
            coords: Coordinates | None = None) -> None:
    """Show `value` to whoever records; does nothing otherwise.

    name: from `VOCABULARY` where one fits. value: a tensor, or a callable that makes one (called only when the
    name is wanted). dims: one name per axis, from batch, time, heads, node, slots, level, tables, bits, dim, ...
    coords: further labels along a dim, `{"level": ("node", levels)}`.
    """
    if torch.compiler.is_compiling():
        return
    recording = _active.get()
    if recording is None or not recording.wants(name):
        return
    with torch.no_grad():
        recording._take(name, value() if callable(value) else value, dims, units, coords or {})


def recording_is_on(name: str) -> bool:
    """Whether an observation of that name would be kept now."""
    if torch.compiler.is_compiling():
        return False
    recording = _active.get()
    return recording is not None and recording.wants(name)


def call_start() -> int:
    """Position, in the recorded stream, of the first token of the memory call under way; 0 when nobody records."""
    recording = _active.get()
    return 0 if recording is None or recording._scope is None else recording._scope[1]


@contextmanager
def record(model: nn.Module, names: Collection[str] | None = None, *, start: int = 0) -> Iterator[Recording]:
    """Record what the memories inside `model` (or `model`, itself a memory) observe.

    names: keep only these observations. start: position of the first token that will be fed, when the model
    resumes from a state. Layers are numbered in the order of `model.modules()`.
    """
    observed = [module for module in model.modules() if isinstance(module, Observed)]
    if not observed:
        raise ValueError(f"model: expected a module with memories inside, got {type(model).__name__} without any")
    recording = Recording(names=None if names is None else frozenset(names), start=start)
    for layer, module in enumerate(observed):
        recording.layers[layer] = type(module).__name__
        recording._layer_of[id(module)] = layer
    token = _active.set(recording)
    try:
        yield recording
    finally:
        _active.reset(token)


class Observed:
    """Base of modules that observe: each is a `layer` of a recording, and its calls follow one another in `time`.

    It goes before `nn.Module`. `forward` and `step` take x `[batch, time, ...]` or `[batch, dim]` first.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for form in ("forward", "step"):
            if form in vars(cls):
                setattr(cls, form, _scoped(vars(cls)[form]))


def _scoped(call: Callable) -> Callable:
    # Done once per class, not to the instances while recording: several threads may record one model, each its own.
    @functools.wraps(call)
    def scoped(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording = None if torch.compiler.is_compiling() else _active.get()
        if recording is None:
            return call(self, x, *args, **kwargs)
        with recording._call(self, x.shape[1] if x.ndim > 2 else 1):
            return call(self, x, *args, **kwargs)

    return scoped
