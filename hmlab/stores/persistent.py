"""The persistent tier: an append-only store of evicted slots on disk, searched by approximate nearest neighbours.

Source: Akbar 2025, HARMONY, `PersistentMemory`; the store is LanceDB (Lance files, committed one version at a time).

    store = PersistentMemory.open("slots", dim=32, heads=4)
    cursor = store.append(slots)                # a value: keep it in the state
    found = store.search(queries, 16, cursor)   # sees what was appended up to the cursor, and nothing else
    score_qn = q · k̂_n + log mass_n             # queries carry the scale of the attention

A cursor (branch, watermark) names a view: `watermark` slots, numbered from 0. Nothing in a view ever changes, so a
state that holds a cursor is a value. Appending returns the cursor of the longer view. Who appends to a view that has
been appended to already, by this process or another, begins a new branch that shares the slots up to the watermark:
two continuations of one state never see each other's slots, and no process needs to know of the others.

Durable: an append is one commit, and has happened when it returns; a process killed at any moment leaves all that was
acknowledged, and of what was not, nothing that a cursor reaches. (Lance leaves it to the operating system when pages
reach the disk, so a machine that loses power may lose the last seconds.) Any number of processes may read and append
at once; a reader sees what the cursor that it is given names. Memory: an append holds its own slots, a search what it
returns, in exact search a batch of slots too, and a store keeps at most `CACHE` bytes of its index.
Units: positions in tokens, density in bits per token. Devices: any; the store itself computes on the CPU.
Errors: ValueError naming the argument; for a store of other dimensions, dtype or format, what differs.
"""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hmlab.stores.layout import DTYPES, Shape, Slots
from hmlab.stores.search import Found, View, probe, scan

PARTITION = 1024  # slots in a partition of the index: √n of them at a million, and so as many to compare with as within
GROWTH = 4  # the index is trained anew when there are this many times the slots that it was trained on
CACHE = 2**28  # bytes of the index that an open store keeps in memory, and four times what it keeps of files' metadata
NUMBERS = 256  # of slots in one filter


class Cursor(NamedTuple):
    """The first `watermark` slots of a branch and of those that it grew from. Both are plain numbers below 2^63."""

    branch: int
    watermark: int


START = Cursor(0, 0)
"""The empty view, of which every store has one: a state of zeros."""


class PersistentMemory:
    """An open store. `open` opens one; a context manager closes it."""

    def __init__(self, address: str, shape: Shape, slots: Any, branches: Any) -> None:
        self.address, self.shape = address, shape
        self._slots, self._branches = slots, branches
        self._origins = {START.branch: START}  # of each branch that was looked up, the view that it grew from
        self._reach: dict[int, int] = {}  # watermarks up to which branches are known to hold all slots
        self._tips: dict[int, int] = {}  # watermarks of the branches that this process began

    @classmethod
    def open(cls, address: str | Path, *, dim: int, heads: int, dtype: torch.dtype = torch.float32,
             create: bool = True, options: dict[str, str] | None = None) -> PersistentMemory:
        """Open the store at an address, or make it.

        address: a folder, or what LanceDB takes (s3://bucket/path, gs://, az://). dim: of keys and values, per head.
        dtype: float32 or float64; slots of a narrower one are kept without loss. options: LanceDB's `storage_options`,
        such as credentials. Raises FileNotFoundError if there is none and `create` is False.
        """
        if dim < 1 or heads < 1:
            name, value = ("dim", dim) if dim < 1 else ("heads", heads)
            raise ValueError(f"{name}: expected at least 1, got {value}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        address, shape = str(address), Shape(dim, heads, dtype)
        if not create and "://" not in address and not Path(address).is_dir():  # to connect would make the folder
            raise FileNotFoundError(f"address: no store at {address}")
        # LanceDB reports to stderr how balanced its clusters are, a line for every round of k-means.
        os.environ.setdefault("LANCEDB_LOG", "error")
        import lancedb
        import pyarrow as pa

        # Every read looks for new commits first, so that a cursor from another process can be followed.
        session = lancedb.Session(index_cache_size_bytes=CACHE, metadata_cache_size_bytes=CACHE // 4)
        database = lancedb.connect(address, read_consistency_interval=timedelta(0), storage_options=options,
                                   session=session)  # fmt: skip
        # The slots come last, since it is by them that a store is known. Two processes may be making the same one.
        if "slots" in database.list_tables(limit=2**31 - 1).tables:
            slots = database.open_table("slots")
            shape.check_stored(slots.schema, address)
            branches = database.open_table("branches")
        elif create:
            links = pa.schema([pa.field(name, pa.int64(), nullable=False) for name in ("branch", "parent", "start")])
            branches = database.create_table("branches", schema=links, exist_ok=True)
            slots = database.create_table("slots", schema=shape.schema(), exist_ok=True)
        else:
            raise FileNotFoundError(f"address: no store at {address}")
        return cls(address, shape, slots, branches)

    def append(self, slots: Slots, cursor: Cursor = START) -> Cursor:
        """Write slots behind those of a view, and return the cursor of the view that has them too."""
        self.shape.check_slots(slots)
        spans, count = self._spans(cursor), len(slots.keys)
        if not count:
            return cursor
        branch, watermark = cursor
        if self._tips.get(branch) != watermark:
            branch = self._begin(spans[0][0] if spans else START.branch, watermark)
        # Known again once the commit is known to have happened: after an error, the next append begins a branch.
        self._tips.pop(branch, None)
        self._table("slots").add(self.shape.to_arrow(slots, branch=branch, first=watermark))
        self._tips[branch] = self._reach[branch] = watermark + count
        return Cursor(branch, watermark + count)

    def search(self, queries: Float[Tensor, "queries heads dim"], k: int, cursor: Cursor, *, nprobes: int = 16,
               refine: int = 4, exact: bool = False) -> Found:
        """The k slots of a view with the highest scores, for every query and head.

        nprobes: partitions of the index that are read, more if the view has fewer than k slots in them. refine: the
        best refine · k by the index's 8-bit keys are ranked by their true scores. Slots since the last `index()` are
        all scored. exact: score every slot of the view.
        """
        dim, heads, _ = self.shape
        if queries.ndim != 3 or queries.shape[1:] != (heads, dim) or not queries.is_floating_point():
            raise ValueError(f"queries: expected floats [queries, {heads}, {dim}], got {queries.dtype} "
                             f"{list(queries.shape)}")  # fmt: skip
        for name, value in (("k", k), ("nprobes", nprobes), ("refine", refine)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        view = View(self._table("slots"), self.shape, self._filter(cursor))
        asked = queries.detach().to("cpu", torch.promote_types(queries.dtype, self.shape.dtype)).unbind(1)
        if exact:
            parts = [scan(view, head, of_head, k) for head, of_head in enumerate(asked)]
        else:
            parts = [probe(view, head, of_head, k, nprobes, refine) for head, of_head in enumerate(asked)]
        return Found(*(torch.stack(part, 1).to(queries.device) for part in zip(*parts, strict=True)))

    def read(self, number: Int[Tensor, "slots"], cursor: Cursor) -> Slots:
        """Slots of a view by number, all heads of them, in the order asked for (on the CPU)."""
        if len(number) and not 0 <= number.min() <= number.max() < cursor.watermark:
            raise ValueError(f"number: expected 0 to {cursor.watermark - 1}, got {number.min()} to {number.max()}")
        import pyarrow as pa

        view, slots = self._filter(cursor), self._table("slots")
        distinct, place = number.cpu().unique(return_inverse=True)
        tables = [self.shape.schema().empty_table()]
        for some in distinct.split(NUMBERS) if len(distinct) else ():
            chosen = f"({view}) AND number IN ({', '.join(map(str, some.tolist()))})"
            tables.append(slots.search().where(chosen).limit(len(some)).to_arrow())
        table = pa.concat_tables(tables).sort_by("number")
        return Slots(*(field[place] for field in self.shape.from_arrow(table)))

    def index(self, *, keep: timedelta = timedelta(minutes=10)) -> None:
        """Bring the index up to date with what was appended, and join the small files of many appends.

        Call it now and then: every append is a file and a version, and all slots since are scored in every search. It
        trains anew only when the store has grown `GROWTH`-fold. keep: readers on other machines or in other processes
        may be in the middle of a search that began this long ago; older versions are removed.
        """
        from lancedb.index import Bitmap, BTree, IvfSq

        slots, count = self._table("slots"), len(self)
        trained = int((slots.schema.field("key_0").metadata or {}).get(b"hmlab.trained", 0))
        if count >= max(2 * PARTITION, GROWTH * trained):
            # Rougher partitions than LanceDB's defaults make, in a fifth of the time: more are read than are needed.
            kind = IvfSq(distance_type="dot", target_partition_size=PARTITION, sample_rate=64, max_iterations=20)
            for head in range(self.shape.heads):
                slots.create_index(f"key_{head}", config=kind)
            slots.create_index("branch", config=Bitmap())
            slots.create_index("number", config=BTree())
            slots.update_field_metadata({"path": "key_0", "metadata": {"hmlab.trained": str(count)}})
        for table in (slots, self._table("branches")):
            table.optimize(cleanup_older_than=keep)

    def bytes(self) -> int:
        """Bytes of the slots and of their index, without older versions."""
        slots = self._table("slots")
        return slots.stats()["total_bytes"] + sum(index.size_bytes or 0 for index in slots.list_indices())

    def __len__(self) -> int:
        """Slots in all branches."""
        return self._table("slots").count_rows()

    def close(self) -> None:
        self._slots = self._branches = None

    def __enter__(self) -> PersistentMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _table(self, name: str) -> Any:
        table = getattr(self, f"_{name}")
        if table is None:
            raise ValueError(f"the store at {self.address} is closed")
        return table

    def _begin(self, parent: int, start: int) -> int:
        """A branch of its own for who appends to a view; random, so that processes need not agree."""
        import pyarrow as pa

        branch = secrets.randbelow(2**63 - 1) + 1
        table = self._table("branches")
        table.add(pa.table({"branch": [branch], "parent": [parent], "start": [start]}, schema=table.schema))
        self._origins[branch] = Cursor(parent, start)
        return branch

    def _origin(self, branch: int) -> Cursor:
        if branch not in self._origins:
            found = self._table("branches").search().where(f"branch = {branch}").limit(1).to_arrow().to_pylist()
            if not found:
                raise ValueError(f"cursor: expected a branch of the store at {self.address}, got {branch}")
            self._origins[branch] = Cursor(found[0]["parent"], found[0]["start"])
        return self._origins[branch]

    def _spans(self, cursor: Cursor) -> list[tuple[int, int, int]]:
        """Branches that a view takes slots from, the newest first, each with the numbers first ≤ n < last."""
        spans, (branch, last) = [], cursor
        while last > 0:
            if branch == START.branch:
                raise ValueError(f"cursor: expected watermark 0 in branch 0, which is empty, got {cursor.watermark}")
            parent, first = self._origin(branch)
            if last > first:
                spans.append((branch, first, last))
            branch, last = parent, min(last, first)
        for branch, first, last in spans[:1]:  # a branch begins at a watermark that its parent had reached
            if self._reach.get(branch, first) < last:
                held = self._table("slots").count_rows(f"branch = {branch} AND number < {last}")
                if held < last - first:
                    raise ValueError(f"cursor: expected a watermark of at most {first + held}, which branch {branch} "
                                     f"of {self.address} has reached, got {cursor.watermark}")  # fmt: skip
                self._reach[branch] = last
        return spans

    def _filter(self, cursor: Cursor) -> str:
        """SQL that is true of a view's slots."""
        spans = self._spans(cursor)
        return " OR ".join(f"(branch = {branch} AND number < {last})" for branch, _, last in spans) or "false"
