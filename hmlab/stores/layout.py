"""How slots lie in an Arrow table: one row a slot, and four columns a head.

    key_h = [k̂, log mass], null where mass = 0      value_h = v̂      mass_h      position_h

The score of a slot, q·k̂ + log mass, is then the inner product of [q, 1] with key_h, so that what searches for the
largest inner product ranks by the score itself and needs to know nothing of mass. A head that keeps nothing of a slot
has a null key, which no search finds. `mass_h` is stored beside its logarithm because exp(log m) is not always m.

`number` counts the slots of a view from 0 (`hmlab.stores.persistent`), `branch` says in which branch a slot was
appended. The schema's metadata holds the format's version, dim, heads and dtype. pyarrow is imported where used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
DTYPES = (torch.float32, torch.float64)


class Slots(NamedTuple):
    """Evicted slots, oldest first. A head whose mass is 0 keeps nothing of a slot.

    keys, values: mass-weighted means, keys unrotated. mass: tokens that a slot stands for. position: mean document
    position of those tokens. density: bits per token of the segment. document, segment: where the slot came from.
    """

    keys: Float[Tensor, "slots heads dim"]
    values: Float[Tensor, "slots heads dim"]
    mass: Float[Tensor, "slots heads"]
    position: Float[Tensor, "slots heads"]
    density: Float[Tensor, "slots"]
    document: Int[Tensor, "slots"]
    segment: Int[Tensor, "slots"]


class Rows(NamedTuple):
    """What one head holds of some slots, in the order in which they were read."""

    number: Int[Tensor, "rows"]
    keys: Float[Tensor, "rows dim"]
    values: Float[Tensor, "rows dim"]
    mass: Float[Tensor, "rows"]
    position: Float[Tensor, "rows"]


class Shape(NamedTuple):
    """What all slots of a store have in common."""

    dim: int
    heads: int
    dtype: torch.dtype

    def metadata(self) -> dict[str, str]:
        return {"format": str(FORMAT), "dim": str(self.dim), "heads": str(self.heads),
                "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        number = {torch.float32: pa.float32(), torch.float64: pa.float64()}[self.dtype]
        columns = [pa.field(name, pa.int64(), nullable=False) for name in ("number", "branch", "document", "segment")]
        columns.append(pa.field("density", pa.float64(), nullable=False))
        for head in range(self.heads):
            columns += [
                pa.field(f"key_{head}", pa.list_(number, self.dim + 1)),
                pa.field(f"value_{head}", pa.list_(number, self.dim), nullable=False),
                pa.field(f"mass_{head}", number, nullable=False),
                pa.field(f"position_{head}", pa.float64(), nullable=False),
            ]
        return pa.schema(columns, {f"hmlab.{name}": value for name, value in self.metadata().items()})

    def check_stored(self, stored: pa.Schema, address: str) -> None:
        """Refuse a table of other slots, naming all that differs."""
        held = {key.decode(): value.decode() for key, value in (stored.metadata or {}).items()}
        if "hmlab.format" not in held:
            raise ValueError(f"address: expected a store of slots, {address} holds another table of that name")
        wanted = self.metadata()
        if held["hmlab.format"] != wanted["format"]:  # what else such a store says may mean something else
            wanted = {"format": wanted["format"]}
        differ = [name for name, value in wanted.items() if held.get(f"hmlab.{name}") != value]
        if differ:
            expected = ", ".join(f"{name} {wanted[name]}" for name in differ)
            found = ", ".join(f"{name} {held.get(f'hmlab.{name}')}" for name in differ)
            raise ValueError(f"address: expected a store with {expected}, {address} has {found}")

    def check_slots(self, slots: Slots) -> None:
        """Refuse slots that the store cannot hold without loss."""
        count, per_head = len(slots.keys), (self.heads,)
        shapes = {"keys": (*per_head, self.dim), "values": (*per_head, self.dim), "mass": per_head,
                  "position": per_head, "density": (), "document": (), "segment": ()}  # fmt: skip
        for name, shape in shapes.items():
            field = getattr(slots, name)
            if field.shape != (count, *shape):
                raise ValueError(f"slots.{name}: expected {[count, *shape]}, got {list(field.shape)}")
            if name in ("document", "segment"):
                if field.is_floating_point() or field.dtype == torch.bool:
                    raise ValueError(f"slots.{name}: expected integers, got {field.dtype}")
                continue
            most = torch.float64 if name in ("position", "density") else self.dtype
            if not field.is_floating_point() or torch.promote_types(field.dtype, most) != most:
                raise ValueError(f"slots.{name}: expected floats no wider than {most}, got {field.dtype}")
            if not field.isfinite().all():
                raise ValueError(f"slots.{name}: expected finite numbers, got infinite ones or NaN")
        if (slots.mass < 0).any():
            raise ValueError(f"slots.mass: expected at least 0, got {slots.mass.min().item()}")

    def to_arrow(self, slots: Slots, *, branch: int, first: int) -> pa.Table:
        """The rows of slots that are number `first`, `first` + 1, ... of the branch."""
        import pyarrow as pa

        def vectors(x: Tensor, null: Tensor | None = None) -> pa.Array:
            mask = None if null is None else pa.array(null.numpy())
            return pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), x.shape[1], mask=mask)

        slots = Slots(*(t.detach().cpu() for t in slots))
        keys, values, mass = (t.to(self.dtype) for t in slots[:3])
        count = len(keys)
        columns = [np.arange(first, first + count), np.full(count, branch), slots.document.long().numpy(),
                   slots.segment.long().numpy(), slots.density.double().numpy()]  # fmt: skip
        for head in range(self.heads):
            own = mass[:, head]
            empty = own == 0
            scored = torch.cat((keys[:, head], own.where(~empty, 1).log()[:, None]), 1)
            position = slots.position[:, head].double().numpy()
            columns += [vectors(scored, empty), vectors(values[:, head]), own.numpy(), position]
        return pa.table([column if isinstance(column, pa.Array) else pa.array(column) for column in columns],
                        schema=self.schema())  # fmt: skip

    def from_arrow(self, table: pa.Table) -> Slots:
        """The slots of a table's rows, in their order. The keys of a head whose mass is 0 come back as zeros."""
        heads = [self.rows(table, head) for head in range(self.heads)]
        keys, values, mass, position = (torch.stack(parts, 1) for parts in zip(*(h[1:] for h in heads), strict=True))
        return Slots(keys, values, mass, position, *(_numbers(table[n]) for n in ("density", "document", "segment")))

    def rows(self, table: pa.Table, head: int) -> Rows:
        """One head's part of a table that holds at least `columns_of(head)`."""
        keys, present = _vectors(table[f"key_{head}"], self.dim + 1)
        values, _ = _vectors(table[f"value_{head}"], self.dim)
        number, mass, position = (_numbers(table[name]) for name in ("number", f"mass_{head}", f"position_{head}"))
        return Rows(number, keys[:, :-1].where(present[:, None], 0), values, mass, position)


def columns_of(head: int) -> list[str]:
    """The columns that a search in one head reads."""
    return ["number", *(f"{name}_{head}" for name in ("key", "value", "mass", "position"))]


def concatenate(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _numbers(column: pa.ChunkedArray) -> Shaped[Tensor, "rows"]:
    return torch.tensor(column.to_numpy())  # a copy: Arrow's own memory cannot be written to


def _vectors(column: pa.ChunkedArray, width: int) -> tuple[Float[Tensor, "rows {width}"], Bool[Tensor, "rows"]]:
    """Lists of a fixed size, and which of them are not null."""
    array = column.combine_chunks()
    flat = array.values.slice(array.offset * width, len(array) * width)
    present = torch.tensor(array.is_valid().to_numpy(zero_copy_only=False))
    return torch.tensor(flat.to_numpy(zero_copy_only=False)).view(-1, width), present
