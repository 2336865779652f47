"""Points about the entry: what is refused, and what torch.compile sees."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from hmlab.memory import clone
from hmlab.testing.subject import Subject


def errors(s: Subject) -> None:
    """what the contract does not allow is refused by a ValueError that names the argument"""
    x, tokens = s.inputs(4).x, s.inputs(4).tokens
    mask = torch.zeros(s.batch, 4, dtype=torch.bool, device=s.device)
    state, fewer = s.init_state(), torch.arange(1, s.batch, device=s.device)
    wide = torch.cat([x, x[..., :1]], -1)
    for name, what, call in (
        ("x", "one channel too many", lambda: s.memory(wide, tokens=tokens)),
        ("x", "no time axis", lambda: s.memory(x[:, 0], tokens=tokens[:, 0])),
        ("x", "one channel too many in step", lambda: s.memory.step(wide[:, 0], state, tokens=tokens[:, 0])),
        ("reset", "a float mask", lambda: s.memory(x, tokens=tokens, reset=mask.to(x.dtype))),
        ("reset", "one token too many", lambda: s.memory(x, tokens=tokens, reset=mask[:, [0, 0, 1, 2, 3]])),
        ("reset", "one row too few", lambda: s.memory(x, tokens=tokens, reset=mask[1:])),
        ("valid", "an integer mask", lambda: s.memory(x, tokens=tokens, valid=mask.long())),
        ("valid", "one token too few", lambda: s.memory(x, tokens=tokens, valid=mask[:, 1:])),
        ("tokens", "floats", lambda: s.memory(x, tokens=tokens.to(x.dtype))),
        ("state", "one row too few", lambda: s.memory(x, s.memory.reorder(state, fewer), tokens=tokens)),
        ("state", "one row too few in step", lambda: s.memory.step(x[:, 0], s.memory.reorder(state, fewer))),
        ("tokens", "one token too few", lambda: s.memory(x, tokens=tokens[:, 1:])),
    ):
        _refused(s, name, what, call)


def _refused(s: Subject, name: str, what: str, call: Callable[[], object]) -> None:
    expected = f"{name} with {what}: expected a ValueError that names {name}"
    try:
        call()
    except ValueError as error:
        s.expect(bool(re.search(rf"\b{name}\b", str(error))), f"{expected}, got one that says {error}")
    except Exception as error:
        s.refuse(f"{expected}, got {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    else:
        s.refuse(f"{expected}, it was taken")


def compiled(s: Subject, backend: str, allow_rnn: bool) -> None:
    """torch.compile(fullgraph=True) of forward and its gradient, of forward with a state and masks, and of step gives
    the same"""
    import torch._dynamo

    # A compiled call cannot grow a state by its counter, so it is given room; token 8 is where a binary tree grows.
    whole, prefix, more = s.inputs(7), s.inputs(7, key=1), s.inputs(2, key=2)
    reset = s.mask([".x", "..", "x."])
    state = s.memory.reserve(s.forward(prefix)[1], 8)
    calls = {
        "forward(x, state)": lambda memory: memory(more.x, state, tokens=more.tokens),
        "forward(x, state, reset, valid)": lambda memory: memory(
            more.x, state, tokens=more.tokens, reset=reset, valid=~reset.roll(1, 0)),
    }  # fmt: skip
    if allow_rnn:  # nn.GRU has no masks: the calls it takes depend on where documents begin
        del calls["forward(x, state, reset, valid)"]
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(allow_rnn=allow_rnn):
            memory = torch.compile(s.memory, fullgraph=True, backend=backend, dynamic=False)
            with torch.enable_grad():  # as in training; the others as in generation
                x = whole.x.clone().requires_grad_()
                got, y = memory(x, tokens=whole.tokens)[0], s.memory(x, tokens=whole.tokens)[0]
                slopes = [torch.autograd.grad((out * whole.x).sum(), x)[0] for out in (got, y)]
            s.same(got, y, "y of compiled forward(x) against y of forward(x)", length=7)
            s.same(*slopes, "gradient through compiled forward(x) against that through forward(x)", length=7)
            for name, call in calls.items():
                got, after = call(memory)
                y, want = call(s.memory)
                s.same(got, y, f"y of compiled {name} against y of {name}", length=9)
                s.same_future(after, want, f"compiled {name}", length=9)
            step = torch.compile(s.memory.step, fullgraph=True, backend=backend, dynamic=False)
            x, tokens = more.x[:, 0], more.tokens[:, 0]
            got, after = step(x, clone(state), tokens=tokens)
            y, want = s.memory.step(x, clone(state), tokens=tokens)
            s.same(got, y, "y of compiled step against y of step", length=8)
            s.same_future(after, want, "compiled step", length=8)
    finally:
        torch._dynamo.reset()
