"""Points about what must not reach each other: the past and the future, rows, documents, padding."""

from __future__ import annotations

from dataclasses import replace

import torch

from hmlab.testing.subject import TOKEN_IDS, Inputs, Subject

_LOUD = 100.0  # a leak is seen by what leaks: foreign tokens are this much larger


def _loud(s: Subject, length: int) -> Inputs:
    other = s.inputs(length, key=7)
    return replace(other, x=other.x * _LOUD, tokens=(other.tokens + 1) % TOKEN_IDS)


def future(s: Subject) -> None:
    """later tokens, and later document starts and padding, change nothing"""
    length = max(s.lengths)
    inputs, loud = s.inputs(length), _loud(s, length)
    marks = s.random_mask(length, 0.5)
    for held in (0, 5):
        state = s.forward(s.inputs(held, key=1))[1] if held else None
        y, _ = s.forward(inputs, state)
        for t in range(1, length):
            got, _ = s.forward(inputs.after(t, loud), state)
            s.same(got[:, :t], y[:, :t], f"y before token {t} when x and tokens change from there", length=held + t)
        for t in (1, length // 2, length - 1):
            later = marks & (torch.arange(length, device=s.device) >= t)
            got, _ = s.forward(s.with_masks(inputs, reset=later, valid=~later), state)
            s.same(got[:, :t], y[:, :t], f"y before token {t} when reset and valid change from there", length=held + t)


def rows(s: Subject) -> None:
    """one batch row does not touch another, whatever it holds, NaN included"""
    length = max(s.lengths)
    prefix, inputs, loud = s.inputs(6, key=1), s.inputs(length), _loud(s, length)
    row = s.batch // 2
    others = [r for r in range(s.batch) if r != row]
    chosen = (torch.arange(s.batch, device=s.device) == row)[:, None]
    y, after = s.forward(inputs, s.forward(prefix)[1])
    foreign = {
        "loud": loud.x,
        "NaN": torch.full_like(inputs.x, torch.nan),
    }
    for what, x in foreign.items():
        mixed = replace(inputs, x=torch.where(chosen[..., None], x, inputs.x),
                        tokens=torch.where(chosen, loud.tokens, inputs.tokens))
        before = replace(prefix, x=torch.where(chosen[..., None], x[:, :6], prefix.x))
        state = s.forward(before)[1]
        got, got_after = s.forward(mixed, state)
        s.same(got[others], y[others], f"y of the other rows when row {row} is {what}", length=length + 6)
        stepped, _ = s.fold(mixed.time(0, 5), state)
        s.same(stepped[others], y[others, :5], f"y of steps of the other rows when row {row} is {what}", length=11)
        more = s.inputs(5, key=99)
        s.same(s.forward(more, got_after)[0][others], s.forward(more, after)[0][others],
               f"the tokens after those of the other rows when row {row} is {what}", length=length + 11)
    single = torch.cat([s.forward(inputs.rows([r]), s.forward(prefix.rows([r]))[1])[0] for r in range(s.batch)])
    s.same(y, single, "y of rows together against y of each row alone", length=length + 6)


def _alone(s: Subject, inputs: Inputs, what: str, *, cuts: tuple[tuple[int, ...], ...] = ()) -> None:
    """Masked inputs, from nothing and from a state, whole and in chunks, against each document by itself."""
    valid = inputs.valid
    for held in (0, 6):
        state = s.forward(s.inputs(held, key=1))[1] if held else None
        length = held + inputs.length
        y, states = s.alone(inputs, state)
        for cut in ((), *cuts):
            got, after = s.chunks(inputs, cut, state)
            name = what + (" with a state" if held else "") + (f", cut at {list(cut)}" if cut else "")
            s.same(got, y, f"y of {name} against y of each document alone", length=length)
            s.same_futures(after, states, f"{name} against those after each document alone", length=length)
            if valid is not None:
                s.same(got[~valid], torch.zeros_like(got[~valid]), f"y at padding of {name}", length=length, exact=True)


def packed(s: Subject) -> None:
    """packed documents equal documents alone (reset)"""
    short = s.inputs(5)
    everywhere = tuple((cut,) for cut in range(6))
    for marks in (["x....", "....x", "....."], ["..x..", "x.x..", ".xxx."], ["xxxxx", ".....", "x...x"]):
        named = "documents that start at x in " + " ".join(marks)
        _alone(s, s.with_masks(short, reset=s.mask(marks)), named, cuts=everywhere)
    length = max(s.lengths)
    reset = s.random_mask(length, 0.15)
    inputs = s.with_masks(s.inputs(length), reset=reset)
    _alone(s, inputs, "documents at random places", cuts=((length // 2,), (1, length // 3, length // 3)))
    # The document before is loud: what is left of it, by a difference of sums say, is heard.
    half = torch.zeros_like(reset)
    half[:, length // 2] = True
    inputs = s.with_masks(s.inputs(length).after(length // 2, s.inputs(length)), reset=half)
    loud = s.with_masks(_loud(s, length).after(length // 2, inputs), reset=half)
    y, state = s.forward(inputs)
    got, after = s.forward(loud)
    s.same(got[:, length // 2 :], y[:, length // 2 :], "y of a document when the one before it changes", length=length)
    s.same_future(after, state, "a document when the one before it changes", length=length)


def padding(s: Subject) -> None:
    """padding, left, right, in the middle, NaN even, equals no padding; y is zero there"""
    short = s.inputs(5)
    everywhere = tuple((cut,) for cut in range(6))
    poison = {"numbers": short.x * _LOUD, "NaN": torch.full_like(short.x, torch.nan)}
    for marks in (["x....", "xxx..", "....."], ["....x", "...xx", "xxxxx"], ["..x..", "x.x.x", ".xxx."]):
        valid = ~s.mask(marks)
        for content, x in poison.items():
            inputs = replace(short, x=torch.where(valid[..., None], short.x, x), valid=valid)
            _alone(s, inputs, f"padding at x in {' '.join(marks)} filled with {content}", cuts=everywhere)
    length = max(s.lengths)
    valid = s.random_mask(length, 0.7)
    _alone(s, s.with_masks(s.inputs(length), valid=valid), "padding at random places", cuts=((length // 2,),))


def packed_and_padded(s: Subject) -> None:
    """documents and padding together, at random places, equal documents alone"""
    for key, length in enumerate((9, max(s.lengths))):
        valid = s.random_mask(length, 0.7, key)
        reset = s.random_mask(length, 0.3, key + 10)
        inputs = s.inputs(length, key)
        inputs = replace(inputs, x=inputs.x.masked_fill(~valid[..., None], torch.nan), reset=reset, valid=valid)
        _alone(s, inputs, "documents and padding at random places", cuts=((length // 2,), (1, length // 2, length - 1)))


def positions(s: Subject) -> None:
    """rows that have read different numbers of tokens go on as each would alone"""
    length = 9
    counts = torch.tensor([(0, 3, 7, length)[row % 4] for row in range(s.batch)], device=s.device)
    prefix = s.inputs(length, key=1)
    prefix = s.with_masks(prefix, valid=torch.arange(length, device=s.device) < counts[:, None])
    more = s.inputs(max(s.lengths))
    state = s.forward(prefix)[1]
    _, states = s.alone(prefix)
    alone = [s.forward(more.rows([row]), states[row]) for row in range(s.batch)]
    want = torch.cat([y for y, _ in alone])
    read = f"rows that have read {counts.tolist()} tokens"
    got, after = s.forward(more, state)
    s.same(got, want, f"y of {read} against y of each alone", length=length + more.length)
    s.same_futures(after, [held for _, held in alone], f"{read}, each against alone", length=length + more.length)
    got, after = s.fold(more, state)
    s.same(got, want, f"y of steps of {read} against y of each alone", length=length + more.length)
    s.same_futures(after, [held for _, held in alone], f"{read}, in steps", length=length + more.length)
