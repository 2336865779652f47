"""The contract test itself: every point rejects a memory that breaks it, and passes the sound one."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from hmlab.memory import document_positions
from hmlab.record import observe, recording_is_on
from hmlab.templates.my_memory import Config, MyMemory, State
from hmlab.testing import POINTS, ContractViolation, check_memory, tolerance


class CountedState(NamedTuple):
    total: torch.Tensor
    position: torch.Tensor


class Counted(MyMemory):
    """Sound: the template with a position in every document, which turns what is read."""

    def __init__(self):
        super().__init__(Config(dim=8))
        self.turn = nn.Parameter(torch.linspace(0.1, 1, 8))

    def init_state(self, batch, *, device=None, dtype=None):
        position = torch.zeros(batch, dtype=torch.long, device=device)
        return CountedState(super().init_state(batch, device=device, dtype=dtype).total, position)

    def turned(self, y, position):
        return y * torch.cos(self.turn.float() * position[..., None]).to(y.dtype)

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        self.check_input(x, tokens, reset, valid)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        position, end = document_positions(state.position, reset, valid, x.shape[1])
        y, after = super().forward(x, State(state.total), reset=reset, valid=valid)
        return self.turned(y, position), CountedState(after.total, end.clone())

    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, State(state.total), tokens=tokens)
        return self.turned(y, state.position + 1), CountedState(after.total, state.position + 1)


class Sound(MyMemory):
    def __init__(self):
        super().__init__(Config(dim=8))


# One bug each, told by the name.


class ListState(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state if state is None else State(state[0]), **masks)
        return y, [after.total]


class Widened(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return y.float(), after


class FloatCounter(Counted):
    def init_state(self, batch, **kwargs):
        total, position = super().init_state(batch, **kwargs)
        return CountedState(total, position.to(total.dtype))

    def forward(self, x, state=None, **masks):
        y, (total, position) = super().forward(x, state, **masks)
        return y, CountedState(total, position.to(x.dtype))


class OtherStart(Sound):
    def init_state(self, batch, *, device=None, dtype=None):
        return State(super().init_state(batch, device=device, dtype=dtype).total + 0.1)

    def forward(self, x, state=None, **masks):
        return super().forward(x, super().init_state(len(x), dtype=x.dtype) if state is None else state, **masks)


class SharedStart(Sound):
    def __init__(self):
        super().__init__()
        self.zeros = {}

    def init_state(self, batch, *, device=None, dtype=None):
        return self.zeros.setdefault((batch, dtype), super().init_state(batch, device=device, dtype=dtype))

    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, state, tokens=tokens)
        return y, State(state.total.copy_(after.total))


class ForgetsOnNothing(Sound):
    def forward(self, x, state=None, **masks):
        return super().forward(x, state if x.shape[1] else None, **masks)


class OtherStep(Sound):
    def step(self, x, state, *, tokens=None):
        return super().step(x, State(state.total * 1.001), tokens=tokens)


class LateState(Sound):
    """The state after a chunk of two or more lacks the last token."""

    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return (y, super().forward(x[:, :-1], state)[1]) if x.shape[1] > 2 and not masks.get("valid") else (y, after)


class StopsCounting(Counted):
    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, state, tokens=tokens)
        return y, after._replace(position=after.position.clamp(max=256))


class Coarse(Sound):
    def forward(self, x, state=None, **masks):
        return super().forward(x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x, state, **masks)


class WritesIntoState(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        if state is not None:
            state.total.data.copy_(after.total.data)
        return y, after


class StepWritesUnderGrad(Sound):
    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, state, tokens=tokens)
        state.total.data.copy_(after.total.data)
        return y, after


class GivesOutItsState(Sound):
    """y is the state's own storage, into which the next step writes."""

    def step(self, x, state, *, tokens=None):
        _, after = super().step(x, state, tokens=tokens)
        total = after.total if torch.is_grad_enabled() else state.total.copy_(after.total)
        return total, State(total)


class WritesIntoInput(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        x.data.mul_(2)
        return y, after


class HiddenState(Sound):
    """Part of the state is an attribute of a tensor, which no file holds."""

    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        after.total.count = getattr(state and state.total, "count", 0) + x.shape[1]
        return y * (1 + getattr(state and state.total, "count", 0)), after


class HoldsTheStream(Sound):
    def forward(self, x, state=None, **masks):
        y, _ = super().forward(x, state, **masks)
        total = y.clone()
        return y, State(total[:, -1]) if x.shape[1] else super().forward(x, state)[1]


class SharesOneRow(Sound):
    def init_state(self, batch, *, device=None, dtype=None):
        return State(super().init_state(1, device=device, dtype=dtype).total.expand(batch, -1))


class ReserveForgets(Sound):
    def reserve(self, state, tokens):
        return State(torch.zeros_like(state.total))


class KeepsOrder(Sound):
    def reorder(self, state, rows):
        return State(state.total[torch.arange(len(rows)) % len(state.total)])


class ReorderShares(Sound):
    def reorder(self, state, rows):
        return state if rows.tolist() == list(range(len(state.total))) else super().reorder(state, rows)

    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, state, tokens=tokens)
        return y, after if torch.is_grad_enabled() else State(state.total.copy_(after.total))


class RecordedOtherwise(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return y * (1 + 1e-6) if recording_is_on("state_norm") else y, after


class StepIsSilent(Sound):
    def step(self, x, state, *, tokens=None):
        y, after = self.forward(x[:, None], state)
        observe("gate", lambda: y[..., 0], ("batch", "time"))
        return y[:, 0], after


class ChunksRecordOtherwise(Sound):
    def forward(self, x, state=None, **masks):
        observe("gate", lambda: x.cumsum(1)[..., 0], ("batch", "time"))
        return super().forward(x, state, **masks)


class SeesTheMean(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return y + 1e-4 * x.mean(1, keepdim=True) if x.shape[1] else y, after


class SeesLaterMarks(Sound):
    def forward(self, x, state=None, *, reset=None, **kwargs):
        y, after = super().forward(x, state, reset=reset, **kwargs)
        return y if reset is None else y * (1 + reset.sum(1)[:, None, None]), after


class SeesOtherRows(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return y + 1e-3 * y.mean(0, keepdim=True), after


class MultipliesOtherRowsByZero(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return y + 0 * x.sum(), after


class NoReset(Sound):
    def forward(self, x, state=None, *, reset=None, **kwargs):
        return super().forward(x, state, **kwargs)


class NoResetOfTheState(Sound):
    def forward(self, x, state=None, *, reset=None, **kwargs):
        if reset is not None and state is not None and x.shape[1]:
            reset = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], 1)
        return super().forward(x, state, reset=reset, **kwargs)


class PositionsRunOn(Counted):
    def forward(self, x, state=None, *, reset=None, valid=None, **kwargs):
        y, after = super().forward(x, state, reset=reset, valid=valid, **kwargs)
        start = torch.zeros_like(after.position) if state is None else state.position
        return y, after if reset is None else after._replace(position=start + x.shape[1])


class SubtractsSums(Sound):
    """A document is what is left of the stream when what was before it is taken off: rounding remains."""

    def forward(self, x, state=None, *, reset=None, valid=None, **kwargs):
        y, after = super().forward(x, state, reset=reset, valid=valid, **kwargs)
        if reset is None:
            return y, after
        big = 1e4 * y.roll(1, 1).abs().amax((1, 2), keepdim=True)
        return (y + big) - big, after


class PaddingDecays(Sound):
    def forward(self, x, state=None, *, valid=None, **kwargs):
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
        y, after = super().forward(x, state, **kwargs)
        return y if valid is None else y * valid[..., None], after


class PaddingTimesZero(Sound):
    def forward(self, x, state=None, *, valid=None, **kwargs):
        y, after = super().forward(x, state, valid=valid, **kwargs)
        return (y, after) if valid is None else (y + 0 * (x * valid[..., None]).sum(1, keepdim=True), after)


class PaddingReads(Sound):
    def forward(self, x, state=None, *, valid=None, **kwargs):
        y, after = super().forward(x, state, valid=valid, **kwargs)
        return y if valid is None else y + (~valid[..., None]).to(y), after


class OneMaskAtATime(Sound):
    def forward(self, x, state=None, *, reset=None, valid=None, **kwargs):
        return super().forward(x, state, reset=reset if valid is None else None, valid=valid, **kwargs)


class NoDocumentStartsAtPadding(Sound):
    def forward(self, x, state=None, *, reset=None, valid=None, **kwargs):
        reset = reset if reset is None or valid is None else reset & valid
        return super().forward(x, state, reset=reset, valid=valid, **kwargs)


class OnePositionForAll(Counted):
    def step(self, x, state, *, tokens=None):
        return super().step(x, state._replace(position=state.position.max().expand(len(x))), tokens=tokens)


class StepCutsTheGraph(Sound):
    def step(self, x, state, *, tokens=None):
        return super().step(x, State(state.total.detach()), tokens=tokens)


class NaNBehindTheMask(Sound):
    """The value is masked, the gradient of what was masked is not."""

    def forward(self, x, state=None, *, valid=None, **kwargs):
        y, after = super().forward(x, state, valid=valid, **kwargs)
        return (y, after) if valid is None else (y + torch.where(valid[..., None], 0, (y * 0).sqrt()), after)


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class WrongEverywhere(Sound):
    """The forms agree about a gradient that is wrong."""

    def forward(self, x, state=None, **masks):
        return super().forward(Halves.apply(x), state, **masks)

    def step(self, x, state, *, tokens=None):
        return super().step(Halves.apply(x), state, tokens=tokens)


class ChecksNothing(Sound):
    def check_input(self, *args):
        pass


class StepChecksNothing(Sound):
    def step(self, x, state, *, tokens=None):
        total = state.total + x[:, : self.dim]
        return self.read(total), State(total)


class Branches(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return (y if x.sum().item() > 0 else y * 1), after


class CompiledOtherwise(Sound):
    def step(self, x, state, *, tokens=None):
        y, after = super().step(x, state, tokens=tokens)
        return y * 1.01 if torch.compiler.is_compiling() else y, after


class CompiledGradient(Sound):
    def forward(self, x, state=None, **masks):
        y, after = super().forward(x, state, **masks)
        return (y + y.detach()) / 2 if torch.compiler.is_compiling() else y, after


PLANTED = {
    "shapes": [ListState, Widened, FloatCounter],
    "start": [OtherStart, SharedStart],
    "empty": [ForgetsOnNothing],
    "step": [OtherStep],
    "split": [LateState],
    "far": [StopsCounting],
    "precision": [Coarse],
    "value": [WritesIntoState, StepWritesUnderGrad, GivesOutItsState, WritesIntoInput],
    "file": [HiddenState],
    "state_bytes": [HoldsTheStream, SharesOneRow],
    "reserve": [ReserveForgets],
    "reorder": [KeepsOrder, ReorderShares],
    "recording": [RecordedOtherwise, StepIsSilent, ChunksRecordOtherwise],
    "future": [SeesTheMean, SeesLaterMarks],
    "rows": [SeesOtherRows, MultipliesOtherRowsByZero],
    "packed": [NoReset, NoResetOfTheState, PositionsRunOn, SubtractsSums],
    "padding": [PaddingDecays, PaddingTimesZero, PaddingReads],
    "packed_and_padded": [OneMaskAtATime, NoDocumentStartsAtPadding],
    "positions": [OnePositionForAll],
    "gradients": [StepCutsTheGraph, NaNBehindTheMask, WrongEverywhere],
    "errors": [ChecksNothing, StepChecksNothing],
    "compiled": [Branches, CompiledOtherwise, CompiledGradient],
}

pytestmark = pytest.mark.unchecked


def test_every_point_has_a_planted_bug():
    assert set(PLANTED) == set(POINTS)


@pytest.mark.parametrize(
    ("point", "memory"), [pytest.param(p, m, id=f"{p}-{m.__name__}") for p, ms in PLANTED.items() for m in ms]
)
def test_bug_is_caught(point, memory):
    with pytest.raises(ContractViolation) as caught:
        check_memory(memory, only=[point])
    assert caught.value.point == point
    assert str(caught.value).startswith(f"{point}: ")


@pytest.mark.parametrize("memory", [Sound, Counted])
def test_sound_memory_passes(memory):
    report = check_memory(memory, compile=False)
    assert {line.point for line in report.lines} == set(POINTS) - {"compiled"}
    assert all(line.deviation <= line.tolerance for line in report.lines)


def test_sound_memory_compiles():
    assert check_memory(Counted, only=["compiled"]).lines[0].point == "compiled"


def test_violation_says_where_and_how_much():
    where = r"y from step against y from forward, at \[0, 1, \d\] of \[3, 2, 8\], 2 tokens: "
    how_much = r"\S+ instead of \S+; largest deviation \S+, tolerance \S+ \(batch 3, dim 8, float32\)"
    with pytest.raises(ContractViolation, match=where + how_much):
        check_memory(OtherStep, only=["step"])


def test_other_broken_points_are_named():
    with pytest.raises(ContractViolation, match=r"^packed: .* \[broken too: packed_and_padded\]$"):
        check_memory(NoReset, only=["packed_and_padded", "packed", "step"])


def test_exception_of_the_memory_is_a_violation():
    class Raises(Sound):
        def step(self, x, state, *, tokens=None):
            raise KeyError("lost")

    with pytest.raises(ContractViolation, match=r"^step: the memory raised KeyError: 'lost'"):
        check_memory(Raises, only=["step"])


def test_report_is_a_table_of_what_was_found():
    lines = str(check_memory(Config(dim=8), only=["step", "errors"])).splitlines()
    assert lines[0] == "MyMemory keeps the contract of a memory"
    assert [line.split()[:2] for line in lines[2:]] == [
        ["step", "float32"], ["errors", "float32"], ["step", "bfloat16"],
    ]  # fmt: skip


def test_tolerance_is_of_the_dtype_the_length_and_the_width():
    assert tolerance(torch.float32, 100, 16) == pytest.approx(40 * 2**-23)
    assert tolerance(torch.float32, 400, 16) == pytest.approx(80 * 2**-23)
    assert tolerance(torch.float32, 100, 64) == pytest.approx(80 * 2**-23)
    assert tolerance(torch.bfloat16, 100, 64) == pytest.approx(40 * 2**-7)


@pytest.mark.parametrize(("argument", "value"), [("only", ["stepp"]), ("batch", 1), ("lengths", (0, 1, 2))])
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=argument):
        check_memory(Sound, **{argument: value})
