"""Recording: what memories observe comes out as one Dataset, joined over calls, layers apart."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from hmlab.memory import Memory
from hmlab.record import observe, record, recording_is_on
from hmlab.templates.my_memory import Config, MyMemory


class Shows(Memory):
    """Shows what it is told to, at every call."""

    dim = 4

    def __init__(self, *shown):
        super().__init__()
        self.shown = shown

    def init_state(self, batch, *, device=None, dtype=None):
        return ()

    def forward(self, x, state=None, *, tokens=None, reset=None, valid=None):
        for name, value, dims, *rest in self.shown:
            observe(name, value(x) if callable(value) else value, dims, **(rest[0] if rest else {}))
        return x, state


def x(time, batch=2):
    return torch.arange(batch * time * 4, dtype=torch.float32).reshape(batch, time, 4)


def sums(x):
    return x.sum(-1)


def test_nothing_is_computed_while_nobody_records():
    def forbidden():
        raise AssertionError("computed")

    class Lazy(Shows):
        def forward(self, x, state=None, **masks):
            observe("gate", forbidden, ("batch", "time"))
            return x, state

    memory = Lazy()
    memory(x(3))
    with record(memory, names=["attention"]):
        assert recording_is_on("attention") and not recording_is_on("gate")
        memory(x(3))
    assert not recording_is_on("attention")
    memory(x(3))
    with pytest.raises(AssertionError, match="computed"), record(memory):
        memory(x(3))


def test_dataset_has_names_units_layers_and_positions():
    model = nn.Sequential(Config(dim=4).build(), nn.Identity())
    with record(model, start=7) as recording:
        _, state = model[0](x(3))
        model[0].step(x(1)[:, 0], state)
    data = recording.dataset()
    assert data["state_norm"].dims == ("layer", "batch", "time")
    assert data["state_norm"].shape == (1, 2, 4)
    assert data["time"].values.tolist() == [7, 8, 9, 10]
    assert data["memory"].values.tolist() == ["MyMemory"]
    assert data["state_norm"].attrs == {"long_name": "norm of the state", "units": "1"}
    assert data["time"].attrs == {"long_name": "position", "units": "tokens"}
    assert data.attrs == {}


def test_calls_follow_one_another():
    memory, stream = Config(dim=4).build(), torch.randn(2, 9, 4)
    with record(memory) as whole:
        memory(stream)
    with record(memory) as parts:
        _, state = memory(stream[:, :4])
        _, state = memory.step(stream[:, 4], state)
        memory(stream[:, 5:], state)
    got, want = (r.dataset()["state_norm"] for r in (parts, whole))
    assert got.shape == (1, 2, 9)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_layers_are_apart_and_each_has_its_own_time():
    model = nn.ModuleList([Shows(("gate", sums, ("batch", "time"))), Shows(("gate", sums, ("batch", "time")))])
    with record(model) as recording:
        model[0](x(2))
        model[1](-x(3))
        model[0](x(2))
    gate = recording.dataset()["gate"]
    assert gate.sizes == {"layer": 2, "batch": 2, "time": 4}
    np.testing.assert_array_equal(gate.sel(layer=0), np.tile(sums(x(2)), 2))
    np.testing.assert_array_equal(gate.sel(layer=1)[:, :3], -sums(x(3)))
    assert np.isnan(gate.sel(layer=1)[:, 3]).all()


def test_memory_inside_a_memory_is_a_layer_of_its_own():
    class Outer(Shows):
        def __init__(self):
            super().__init__(("gate", sums, ("batch", "time")))
            self.inner = Shows(("ratio", sums, ("batch", "time")))

        def forward(self, x, state=None, **masks):
            self.inner(x[:, :1])
            return super().forward(x, state)

    outer = Outer()
    with record(outer) as recording:
        outer(x(2))
        outer(x(2))
    data = recording.dataset()
    assert data["gate"].sel(layer=0).notnull().sum("batch").values.tolist() == [2, 2, 2, 2]
    assert data["ratio"].sel(layer=1).notnull().sum("batch").values.tolist() == [2, 2, 0, 0]


def test_reading_of_a_call_stands_at_its_last_token():
    memory = Shows(("ratio", lambda x: x[:, 0, 0], ("batch",)), ("gate", sums, ("batch", "time")))
    with record(memory) as recording:
        memory(x(3))
        memory(x(2))
    ratio = recording.dataset()["ratio"].sel(layer=0).transpose("batch", "time")
    assert np.isnan(ratio[:, [0, 1, 3]]).all()
    np.testing.assert_array_equal(ratio[:, 2], x(3)[:, 0, 0])
    np.testing.assert_array_equal(ratio[:, 4], x(2)[:, 0, 0])


def test_axes_that_grow_are_filled_with_what_is_not_a_value():
    memory = Shows(
        ("attention", lambda x: torch.ones(2, x.shape[1], x.shape[1]), ("batch", "time", "key")),
        ("bucket", lambda x: torch.ones(2, x.shape[1], x.shape[1], dtype=torch.int64), ("batch", "time", "key")),
    )
    with record(memory) as recording:
        memory(x(1))
        memory(x(2))
    data = recording.dataset().isel(layer=0, batch=0)
    np.testing.assert_array_equal(data["attention"], [[1, np.nan], [1, 1], [1, 1]])
    np.testing.assert_array_equal(data["bucket"], [[1, -1], [1, 1], [1, 1]])
    assert data["bucket"].dtype == np.int64


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_unsigned_values_keep_room_for_missing_ones(dtype):
    memory = Shows(("tier", lambda x: torch.ones(2, x.shape[1], x.shape[1], dtype=dtype), ("batch", "time", "key")))
    with record(memory) as recording:
        memory(x(1))
        memory(x(2))
    assert recording.dataset()["tier"].isel(layer=0, batch=0, time=0).values.tolist() == [1, -1]


def test_half_precision_comes_out_as_float32():
    memory = Shows(("gate", lambda x: sums(x).bfloat16(), ("batch", "time")))
    with record(memory) as recording:
        memory(x(1))
    assert recording.dataset()["gate"].dtype == np.float32


def test_later_changes_in_place_do_not_reach_the_recording():
    value = torch.ones(2, 1)
    memory = Shows(("gate", value, ("batch", "time")))
    with record(memory) as recording:
        memory(x(1))
        value.zero_()
    assert (recording.dataset()["gate"] == 1).all()


def test_observing_leaves_gradients_alone():
    memory = Config(dim=4).build()
    with record(memory) as recording:
        y, _ = memory(x(3).requires_grad_())
    y.sum().backward()
    assert memory.logit.grad.abs().sum() > 0
    assert recording.names_seen == ("state_norm",)


def test_coordinates_grow_with_their_axis():
    def levels(x):
        return {"coords": {"level": ("node", list(range(x.shape[1])))}}

    class Growing(Shows):
        def forward(self, x, state=None, **masks):
            observe("attention", torch.ones(2, x.shape[1], x.shape[1]), ("batch", "time", "node"), **levels(x))
            return x, state

    memory = Growing()
    with record(memory) as recording:
        memory(x(3))
        memory(x(2))
    assert recording.dataset()["attention"]["level"].values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("first", "second", "says"), [
    (("gate", torch.ones(2, 1), ("batch", "time")), ("gate", torch.ones(2, 1), ("batch", "heads")), "dims changed"),
    (("gate", torch.ones(2, 1, 2), ("batch", "time", "node"), {"coords": {"level": ("node", [0, 1])}}),
     ("gate", torch.ones(2, 1, 2), ("batch", "time", "node"), {"coords": {"level": ("node", [0, 0])}}),
     "coordinate 'level' changed"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(first, second, says):
    model = nn.ModuleList([Shows(first), Shows(second)])
    with record(model) as recording:
        model[0](x(1))
        model[1](x(1))
    with pytest.raises(ValueError, match=f"observe\\('gate'\\): {says}"):
        recording.dataset()


def test_dims_must_name_every_axis():
    memory = Shows(("gate", torch.ones(2, 1, 1), ("batch", "time")))
    with pytest.raises(ValueError, match=r"observe\('gate'\): dims .* name 2 axes, the value has 3"), record(memory):
        memory(x(1))


def test_no_tokens_show_nothing():
    memory = Shows(("ratio", lambda x: x.sum((1, 2)), ("batch",)), ("gate", sums, ("batch", "time")))
    with record(memory) as recording:
        memory(x(0))
        assert recording.names_seen == ()
        memory(x(2))
        memory(x(0))
        memory(x(1))
    data = recording.dataset()
    assert data["gate"].sizes["time"] == 3
    assert data["ratio"].isel(layer=0, batch=0).notnull().values.tolist() == [False, True, True]


def test_failed_call_takes_no_time():
    memory = Config(dim=4).build()
    with record(memory) as recording:
        with pytest.raises(ValueError, match="x: expected"):
            memory(x(3)[..., :3])
        memory(x(2))
    assert recording.dataset()["time"].values.tolist() == [0, 1]


def test_clear_forgets_and_begins_again():
    memory = Shows(("gate", sums, ("batch", "time")))
    with record(memory, start=5) as recording:
        memory(x(2))
        recording.clear()
        memory(x(1))
    assert recording.dataset()["time"].values.tolist() == [5]


def test_another_model_is_left_out():
    memory, other = Shows(("gate", sums, ("batch", "time"))), Shows(("ratio", sums, ("batch", "time")))
    with record(memory) as recording:
        other(x(2))
        memory(x(1))
    assert recording.names_seen == ("gate",)
    assert recording.dataset()["time"].values.tolist() == [0]


def test_recordings_inside_one_another_do_not_undo_each_other():
    memory = Shows(("gate", sums, ("batch", "time")))
    with record(memory) as outer:
        memory(x(1))
        with record(memory) as inner:
            memory(x(3))
        memory(x(1))
    assert outer.dataset()["gate"].sizes["time"] == 2
    assert inner.dataset()["gate"].sizes["time"] == 3


def test_each_thread_records_for_itself():
    memory = Shows(("gate", sums, ("batch", "time")))
    both, found = threading.Barrier(2), {}

    def look(time):
        with record(memory) as recording:
            both.wait()  # both recordings are on
            memory(x(time))
            both.wait()  # both have been fed before either ends
        found[time] = recording.dataset()["gate"].sizes["time"]

    threads = [threading.Thread(target=look, args=(time,)) for time in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {2: 2, 3: 3}


def test_nothing_to_record_is_an_error():
    with pytest.raises(ValueError, match="model: expected a module with memories inside, got Linear"), \
            record(nn.Linear(2, 2)):
        pass
    with record(Shows()) as recording:
        pass
    with pytest.raises(RuntimeError, match="nothing was observed"):
        recording.dataset()


def test_compiled_memory_observes_nothing():
    memory = MyMemory(Config(dim=4))
    compiled = torch.compile(memory, backend="eager", fullgraph=True)
    with record(memory) as recording, torch.no_grad():
        compiled(x(2))
    assert recording.names_seen == ()
