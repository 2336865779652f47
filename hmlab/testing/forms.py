"""Points about one stream: however it is run, the same comes out; and the state is a value."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hmlab.memory import clone, load_state, save_state
from hmlab.record import record
from hmlab.testing.subject import Subject, leaves


def shapes(s: Subject) -> None:
    """y has the shape and dtype of x; the state is a NamedTuple of tensors, batch first, counts in integers"""
    for length in s.lengths:
        inputs = s.inputs(length)
        y, state = s.forward(inputs)
        s.same(y, y.reshape(inputs.x.shape).to(inputs.x.dtype), "y", length=length, exact=True)
        _check_state(s, state, f"the state after {length} tokens")
    _check_state(s, s.init_state(), "init_state")
    # Three states, each one token on: a float that grows by exactly one each time is a counter.
    inputs, states = s.inputs(7), []
    for length in (5, 6, 7):
        states.append(dict(leaves(s.forward(inputs.time(0, length))[1])))
    for name, leaf in states[0].items():
        if leaf.is_floating_point() and leaf.numel() and torch.finfo(leaf.dtype).eps > 2**-16:
            later = [state.get(name) for state in states]
            if all(t is not None and t.shape == leaf.shape for t in later):
                steps = [bool((b - a == 1).all()) for a, b in pairwise(later)]
                s.expect(not all(steps), f"state{name}: counts tokens in {leaf.dtype}, which stops counting at 256; "
                         "expected an integer tensor")


def _check_state(s: Subject, state: Any, what: str) -> None:
    s.expect(hasattr(state, "_fields"), f"{what}: expected a NamedTuple, got {type(state).__name__}")
    for name, leaf in leaves(state):
        s.expect(isinstance(leaf, Tensor), f"{what}: expected only tensors, {name} is {type(leaf).__name__}")
        s.expect(leaf.ndim > 0 and len(leaf) == s.batch, f"{what}: expected batch first, {name} is {list(leaf.shape)}")
        s.expect(leaf.device.type == torch.device(s.device).type, f"{what}: {name} is on {leaf.device}")


def start(s: Subject) -> None:
    """no state is the same as init_state(batch), and each init_state is a new one"""
    inputs = s.inputs(5)
    y, state = s.forward(inputs)
    for what in ("init_state", "a second init_state"):
        initial = s.init_state()
        got, after = s.forward(inputs, initial)
        s.same(got, y, f"y from {what} against y from no state", length=5)
        s.same_future(after, state, f"{what} and 5 tokens", length=5)
        s.fold(inputs, initial)  # may use the initial state up; the next one must not notice


def reserve(s: Subject) -> None:
    """room reserved in the state changes nothing"""
    more = s.inputs(5, key=1)
    for held in (0, 6):
        state = s.forward(s.inputs(held))[1] if held else s.init_state()
        y, after = s.forward(more, state)
        roomy = s.memory.reserve(clone(state), 40)
        for form, run in (("forward", s.forward), ("step", s.fold)):
            got, got_after = run(more, clone(roomy))
            s.same(got, y, f"y of {form} with room for 40 tokens against y without", length=held + 5)
            s.same_future(got_after, after, f"{form} with room for 40 tokens", length=held + 5)


def empty(s: Subject) -> None:
    """no tokens change nothing"""
    for held in (0, 5):
        state = s.forward(s.inputs(held))[1] if held else None
        nothing = s.inputs(0)
        y, after = s.forward(nothing, state)
        s.expect(y.shape == nothing.x.shape, f"y of no tokens: expected {list(nothing.x.shape)}, got {list(y.shape)}")
        s.same_future(after, s.init_state() if state is None else state, f"{held} tokens and then none", length=held)
        no = torch.zeros(s.batch, 0, dtype=torch.bool, device=s.device)
        s.forward(s.with_masks(nothing, reset=no, valid=no), state)


def step(s: Subject) -> None:
    """step, token by token, equals forward"""
    whole = s.inputs(max(s.lengths))
    folded, state, states = [], s.init_state(), {0: s.init_state()}
    for t in range(whole.length):
        y, state = s.fold(whole.time(t, t + 1), state)
        folded.append(y)
        states[t + 1] = clone(state)  # a step may use up the state it is given
    for length in s.lengths:
        y, after = s.forward(whole.time(0, length))
        got = torch.cat(folded[:length], 1) if length else y
        s.same(got, y, "y from step against y from forward", length=length)
        s.same_future(states[length], after, "steps against those after forward", length=length)


def split(s: Subject) -> None:
    """cutting the stream into chunks and single steps, anywhere, changes nothing"""
    for length in s.lengths:
        inputs = s.inputs(length)
        y, state = s.forward(inputs)
        for cuts in _cuts(s, length):
            got, after = s.chunks(inputs, cuts)
            s.same(got, y, f"y of chunks cut at {cuts} against y at once", length=length)
            s.same_future(after, state, f"chunks cut at {cuts} against those after one call", length=length)
    length = max(s.lengths)
    inputs = s.inputs(length)
    y, _ = s.forward(inputs)
    a, b = length // 3, 2 * length // 3
    first, state = s.forward(inputs.time(0, a))
    middle, state = s.fold(inputs.time(a, b), clone(state))
    last, _ = s.forward(inputs.time(b, length), state)
    s.same(torch.cat([first, middle, last], 1), y, f"y of forward, step from {a}, forward from {b}, against y at once",
           length=length)


def _cuts(s: Subject, length: int) -> list[tuple[int, ...]]:
    """Every cut of a short stream, some of a long one; a cut twice in one place is a chunk of no tokens."""
    if length <= 5:
        return [(cut,) for cut in range(length + 1)] + [tuple(range(1, length))]
    random = np.random.default_rng(s.seed + length)
    return [(1,), (length - 1,), (length // 2, length // 2)] + [
        tuple(sorted(random.integers(0, length + 1, size=4).tolist())) for _ in range(3)
    ]


def far(s: Subject) -> None:
    """beyond 256 tokens, where small floats stop counting, step still equals forward"""
    inputs = s.inputs(262)
    y, after = s.forward(inputs)
    _, state = s.forward(inputs.time(0, 254))
    got, state = s.fold(inputs.time(254, 262), clone(state))
    s.same(got, y[:, 254:], "y from steps 254 to 262 against y from forward", length=262)
    s.same_future(state, after, "262 tokens", length=262)


def precision(s: Subject) -> None:
    """y is as precise as the dtype allows, measured against the same parameters in a wider one"""
    wider = s.double() if s.dtype == torch.float32 else s.of(torch.float32)
    if wider is None:
        return
    exact = wider.memory
    parameters = {name: p.to(wider.dtype) for name, p in s.memory.named_parameters()}  # rounded; buffers are not
    exact.load_state_dict({**exact.state_dict(), **parameters})
    inputs = s.inputs(max(s.lengths))
    y, _ = exact(inputs.x.to(wider.dtype), tokens=inputs.tokens)
    s.same(s.forward(inputs)[0].to(wider.dtype), y, f"y against y in {wider.dtype}", length=inputs.length)


def value(s: Subject) -> None:
    """the state is a value: forward leaves it, its inputs and what came before alone; so does step under grad"""
    prefix, more, other = s.inputs(5), s.inputs(4, key=1), s.inputs(4, key=2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y0, state = s.forward(prefix)
            held, y0_held, x_held = clone(state), y0.clone(), more.x.clone()
            y, after = s.forward(more, state)
            after_held = clone(after)
            s.forward(other, state)
            if grad:
                s.fold(more, state)
            else:
                s.fold(more, clone(after))
            for name, now, then in _pairs(state, held):
                s.same(now, then, f"state{name} after it was used (grad: {grad})", length=9, exact=True)
            for name, now, then in _pairs(after, after_held):
                s.same(now, then, f"a later state{name} after the earlier one was used again", length=9, exact=True)
            s.same(more.x, x_held, "x after it was read", length=4, exact=True)
            s.same(s.forward(more, state)[0], y, "y of the same call again", length=9, exact=True)
            s.same(y0, y0_held, "an earlier y after later calls", length=9, exact=True)
    # Without grad a step may write into the state it was given, but never into a y that it has given out.
    state, given, copies = s.init_state(), [], []
    for t in range(prefix.length):
        y, state = s.memory.step(prefix.x[:, t], state, tokens=prefix.tokens[:, t])
        given.append(y)
        copies.append(y.clone())
    s.same(torch.stack(given), torch.stack(copies), "an earlier y after later steps", length=5, exact=True)


def _pairs(state: Any, other: Any) -> list[tuple[str, Tensor, Tensor]]:
    return [(name, a, b) for (name, a), (_, b) in zip(leaves(state), leaves(other), strict=True)]


def file(s: Subject) -> None:
    """saving the state to a file and resuming from it changes nothing"""
    more = s.inputs(5, key=1)
    for length in (0, 5, max(s.lengths)):
        state = s.forward(s.inputs(length))[1]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            save_state(state, path)
            resumed = load_state(s.init_state(1), path)
        resumed = pytree.tree_map(lambda t: t.to(s.device), resumed)
        s.expect(type(resumed) is type(state), f"the resumed state: expected {type(state)}, got {type(resumed)}")
        s.same(s.forward(more, resumed)[0], s.forward(more, state)[0], "y resumed from a file against y not stopped",
               length=length + 5, exact=True)


def state_bytes(s: Subject) -> None:
    """the declared state bytes are what the state keeps alive"""
    inputs = s.inputs(max(s.lengths))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            state = s.forward(inputs)[1]
            for what, held in (
                ("init_state", s.init_state()), ("forward", state),
                ("a chunk of one", s.forward(s.inputs(1), state)[1]),
                ("a chunk of none", s.forward(s.inputs(0), state)[1]),
                ("a step", s.fold(s.inputs(1), clone(state))[1]),
                ("reorder", s.memory.reorder(state, torch.tensor([0], device=s.device))),
            ):  # fmt: skip
                storages = [leaf.untyped_storage() for _, leaf in leaves(held)]
                real = sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())
                declared = s.memory.state_bytes(held)
                s.expect(declared == real, f"state_bytes after {what}: {declared} bytes declared, {real} held "
                         "(a view holds the whole of what it looks at; an expanded tensor less than it shows)")


def reorder(s: Subject) -> None:
    """reorder(state, rows) is the state of those rows, and shares nothing with the old one"""
    prefix, more = s.inputs(6), s.inputs(4, key=1)
    state = s.forward(prefix)[1]
    for chosen in ([s.batch - 1, 0, 0, 1 % s.batch], [1 % s.batch]):
        rows = torch.tensor(chosen, dtype=torch.long, device=s.device)
        got = s.memory.reorder(state, rows)
        want = s.forward(prefix.rows(chosen))[1]
        s.same_future(got, want, f"reorder to {chosen} against the reordered rows", length=6)
    before = s.forward(more, state)[0]
    s.fold(more, s.memory.reorder(state, torch.arange(s.batch, device=s.device)))
    s.same(s.forward(more, state)[0], before, "y from the state after steps of its reordered copy", length=10,
           exact=True)


def recording(s: Subject) -> None:
    """recording changes no bit of y, and chunks and steps record what one call records"""
    inputs = s.inputs(max(s.lengths))
    cuts = (inputs.length // 3, inputs.length // 2)
    datasets = {}
    for name, run in (("one call", s.forward), ("chunks", lambda i: s.chunks(i, cuts)), ("steps", s.fold)):
        y, state = run(inputs)
        with record(s.memory) as held:
            seen, seen_state = run(inputs)
        s.same(seen, y, f"y of {name} recorded against y not recorded", length=inputs.length, exact=True)
        for field, now, then in _pairs(seen_state, state):
            s.same(now, then, f"state{field} of {name} recorded against not recorded", length=inputs.length, exact=True)
        datasets[name] = held.dataset() if held.names_seen else None
    whole = datasets.pop("one call")
    for name, parts in datasets.items():
        names = [sorted(d.data_vars) if d is not None else [] for d in (parts, whole)]
        s.expect(names[0] == names[1], f"{name} record {names[0]}, one call records {names[1]}")
        for variable in names[0]:
            _same_recording(s, parts[variable], whole[variable], f"{variable!r} recorded by {name} against by one call")


def _same_recording(s: Subject, got: Any, want: Any, what: str) -> None:
    import xarray as xr

    length = max(s.lengths)
    s.expect(got.dims == want.dims, f"{what}: dims {got.dims} instead of {want.dims}")
    if want.sizes["time"] == length:
        s.expect(got.sizes["time"] == length, f"{what}: {got.sizes['time']} positions instead of {length}")
    # A reading of a whole call stands at the call's last token: compare where both have one.
    got, want = xr.align(got, want, join="inner", exclude=set(got.dims) - {"time"})
    missing = [d.isnull() if np.issubdtype(d.dtype, np.floating) else d == -1 for d in (got, want)]
    got, want = (d.astype("float64").where(~m) for d, m in zip((got, want), missing, strict=True))
    # An axis that has grown less far (keys, levels) reads as unseen there, and what is unseen weighs nothing.
    got, want = xr.align(got, want, join="outer")
    s.same(torch.from_numpy(got.fillna(0.0).values.copy()), torch.from_numpy(want.fillna(0.0).values.copy()), what,
           length=length)
