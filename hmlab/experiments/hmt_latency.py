"""What does HMT's recall cost as the cache grows, and where may the cache lie? Reading 10 M tokens in flat memory.

    python -m hmlab.experiments.hmt_latency latency --output hmt_latency.csv
    python -m hmlab.experiments.hmt_latency read --output hmt_reading.csv

`latency`: the time of one `Recall.forward`, one row: the query's projection, N scores, softmax, weighted sum. The cache
and its keys lie

    device        where the rest is computed
    host          in main memory, while the rest is on a GPU (left out without one, where it is the same as device)
    disk, warm    in a file mapped to memory, all of it in the system's page cache
    disk, cold    the same after its pages were dropped from that; `disk_bytes` is what was really read for a call
    store         in `hmlab.stores.PersistentMemory` (LanceDB), which returns the best 32 of all exactly scored, and
                  softmax and sum are over those

Places take turns, repeat after repeat, on one query; dropping pages and mapping the file again is not timed. `floor` is
the bytes of W_q, keys and memories over the measured bandwidth of a copy. `noise` is by what share the medians of even
and odd repeats differ. On a machine that others use, `least` and `cpu_seconds`, the median of the process's own time
(which waits for no disk), say more.

`read`: random tokens through a one-layer Llama with random weights in segments of 333 tokens. What it answers is noise;
its time and memory are not. `resident_bytes` is the process's at that moment, `peak_bytes` its highest so far. What is
finished is kept in a folder; interrupted, the command goes on with what is missing.

Units: seconds, bytes, tokens. Source of the question: arXiv 2405.06067.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hmlab_kernels import _machine
from jaxtyping import Float, Int
from torch import Tensor

from hmlab import atomic
from hmlab.experiments.apparatus import conduct, parser
from hmlab.memory import state_bytes
from hmlab.wrappers.hmt import HMT, Recall

PLACES = ("device", "host", "disk, warm", "disk, cold", "store")
NEAREST = 32  # memories that the store returns


@dataclass(frozen=True, kw_only=True)
class Setting:
    """widths, memories: of the caches that are timed, where a call moves at most `largest` bytes; in the store those of
    at most `stored`. repeats: of each, fewer (but `least`) where all together take longer than `seconds`. tokens,
    cache_sizes: of what is read; measured every `every` tokens."""

    widths: tuple[int, ...] = (64, 1024, 4096)
    memories: tuple[int, ...] = (10, 100, 1000, 10_000, 100_000)
    largest: int = 2**32
    stored: int = 2**28
    repeats: int = 31
    least: int = 5
    seconds: float = 15.0
    tokens: int = 10_000_000
    cache_sizes: tuple[int, ...] = (300, 3000)
    every: int = 1_000_000
    width: int = 64
    segment_length: int = 333


class Place(NamedTuple):
    """call: one recall. before: what is done before each, untimed."""

    call: Callable[[], object]
    before: Callable[[], object]


class Mapped:
    """A cache and its keys in files, mapped to memory."""

    def __init__(self, folder: Path, cache: Tensor, keys: Tensor) -> None:
        self._parts = [(folder / name, part) for name, part in (("cache", cache), ("keys", keys))]
        self._shapes = [tuple(part.shape) for _, part in self._parts]
        for path, part in self._parts:
            with path.open("wb") as file:
                file.write(part.numpy().data)
                file.flush()
                # Pages that are not written yet cannot be dropped.
                os.fsync(file.fileno())
        self._parts = [(path, None) for path, _ in self._parts]
        self.map()

    def map(self) -> None:
        found = []
        for (path, _), shape in zip(self._parts, self._shapes, strict=True):
            size = path.stat().st_size // 4
            found.append(torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape))
        self.cache, self.keys = found

    def drop(self) -> None:
        """Out of memory: mapped pages stay, so the files are unmapped first."""
        del self.cache, self.keys
        for path, _ in self._parts:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.map()


def disk_bytes_read() -> int:
    """By this process, from devices rather than the page cache, so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@contextmanager
def places(recall: Recall, summary: Float[Tensor, "1 1 width"], cache: Float[Tensor, "1 slots 1 width"], device: str,
           stored: int) -> Iterator[dict[str, Place]]:
    """Every place that this machine has, and the store for up to `stored` bytes of cache."""
    count = torch.tensor([cache.shape[1]], device=device)
    searching = torch.ones(1, dtype=torch.bool, device=device)
    keys = recall.keys(cache.to(device)).cpu()
    recall, summary = recall.to(device), summary.to(device)

    def nothing() -> None:
        pass

    def search(cache: Tensor, keys: Tensor) -> Tensor:
        return recall(summary, cache, keys, count, searching)[0]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hmt_latency-")))
        near = (cache.to(device), keys.to(device))
        found = {"device": Place(lambda: search(*near), nothing)}
        if device != "cpu":
            found["host"] = Place(lambda: search(cache, keys), nothing)
        mapped = Mapped(folder, cache, keys)
        for part in (mapped.cache, mapped.keys):
            part.sum()
        found["disk, warm"] = Place(lambda: search(mapped.cache, mapped.keys), nothing)
        (folder / "cold").mkdir()
        cold = Mapped(folder / "cold", cache, keys)
        found["disk, cold"] = Place(lambda: search(cold.cache, cold.keys), cold.drop)
        if cache.nbytes <= stored:
            found["store"] = Place(_stored(stack, folder, recall, summary, cache, keys), nothing)
        yield found


def _stored(stack: ExitStack, folder: Path, recall: Recall, summary: Tensor, cache: Tensor, keys: Tensor
            ) -> Callable[[], Tensor]:
    from hmlab.stores.layout import Slots
    from hmlab.stores.persistent import PersistentMemory

    slots, width = cache.shape[1], cache.shape[-1]
    store = stack.enter_context(PersistentMemory.open(folder / "store", dim=width, heads=1))
    one = torch.ones(slots, 1)
    number = torch.arange(slots)
    cursor = store.append(Slots(keys[0], cache[0], one, number[:, None].float(), one[:, 0], number * 0, number))

    def search() -> Tensor:
        query = torch.nn.functional.normalize(recall.query(summary)[:, 0], dim=-1)
        found = store.search(query[:, None] * recall.scale.exp(), min(NEAREST, slots), cursor, exact=True)
        return torch.einsum("qhk,qhkd->qhd", found.score.softmax(-1), found.values)

    return search


@torch.no_grad()
def timed(found: dict[str, Place], setting: Setting, device: str) -> dict[str, dict[str, float]]:
    """Median, quartiles, least, noise and bytes read from the disk of a call of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in found}
    worked: dict[str, list[float]] = {name: [] for name in found}
    disk = dict.fromkeys(found, 0)
    began = time.perf_counter()
    for place in found.values():
        place.call()
    for repeat in range(setting.repeats):
        if repeat >= setting.least and time.perf_counter() - began > setting.seconds:
            break
        for name, place in found.items():
            place.before()
            before, own = disk_bytes_read(), time.process_time()
            taken[name].append(_machine.seconds(place.call, device))
            worked[name].append(time.process_time() - own)
            disk[name] += disk_bytes_read() - before
    rows = {}
    for name, times in taken.items():
        every = torch.tensor(times, dtype=torch.float64)
        low, median, high = every.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        rows[name] = {"median": median, "low": low, "high": high, "least": min(times), "repeats": len(times),
                      "noise": abs(float(every[::2].median() / every[1::2].median()) - 1),
                      "cpu_seconds": statistics.median(worked[name]),
                      "disk_bytes": disk[name] / len(times)}  # fmt: skip
    return rows


def latency(setting: Setting, say: Any = print, device: str | None = None) -> Any:
    """A Dataset (width, memories, place)."""
    import numpy as np
    import xarray as xr

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    columns = ("median", "low", "high", "least", "cpu_seconds", "repeats", "noise", "disk_bytes", "bytes", "floor")
    shape = (len(setting.widths), len(setting.memories), len(PLACES))
    table, bandwidth = {name: np.full(shape, np.nan) for name in columns}, _machine.copy_bandwidth(device)
    for w, width in enumerate(setting.widths):
        recall = Recall(width, width, key_norm=True, each=False).eval()
        for m, count in enumerate(setting.memories):
            moved = 4 * width * (width + 2 * count)  # W_q, keys and memories, each once
            if moved > setting.largest:
                continue
            torch.manual_seed(0)
            summary, cache = torch.randn(1, 1, width), torch.randn(1, count, 1, width)
            with torch.no_grad(), places(recall, summary, cache, device, setting.stored) as found:
                rows = timed(found, setting, device)
            for name, row in rows.items():
                row |= {"bytes": moved, "floor": moved / bandwidth}
                for column in columns:
                    table[column][w, m, PLACES.index(name)] = row[column]
            say(f"width {width}, {count} memories: " +
                ", ".join(f"{name} {row['median'] * 1e3:.3f} ms" for name, row in rows.items()))
    dims = ("width", "memories", "place")
    dataset = xr.Dataset({name: (dims, values) for name, values in table.items()},
                         {"width": list(setting.widths), "memories": list(setting.memories),
                          "place": list(PLACES)})  # fmt: skip
    for name in ("median", "low", "high", "least", "cpu_seconds", "floor"):
        dataset[name].attrs["units"] = "s"
    for name in ("bytes", "disk_bytes"):
        dataset[name].attrs["units"] = "bytes"
    missing = [] if device != "cpu" else ["host"]
    return dataset.assign_attrs(setting=asdict(setting), copy_bandwidth_bytes_per_s=bandwidth, not_measured=missing,
                                experiment="hmlab.experiments.hmt_latency", **_machine.facts(device))  # fmt: skip


def reader(setting: Setting, cache_size: int) -> HMT:
    """One layer of a Llama with random weights, in an HMT."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = HMT.Config(segment_length=setting.segment_length, cache_size=cache_size)
    torch.manual_seed(0)
    return HMT(LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=setting.width, intermediate_size=2 * setting.width, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=config.places,
    )), config).eval()  # fmt: skip


def readings(hmt: HMT, setting: Setting) -> Iterator[dict[str, float]]:
    """What is held and how long it took, after every so many tokens."""
    import resource

    import psutil

    generator, state, done, spent = torch.Generator().manual_seed(0), None, 0, 0.0
    at_once = 16 * setting.segment_length
    while done < setting.tokens:
        goal = min(done + setting.every, setting.tokens)
        while done < goal:
            ids: Int[Tensor, "1 time"] = torch.randint(256, (1, min(at_once, goal - done)), generator=generator)
            began = time.process_time()
            state = hmt.prefill(ids, state)
            spent, done = spent + time.process_time() - began, done + ids.shape[1]
        yield {"tokens": done, "cpu_seconds": spent, "resident_bytes": psutil.Process().memory_info().rss,
               "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
               "state_bytes": state_bytes(state), "held": min(int(state.count), hmt.config.cache_size)}  # fmt: skip


def read(setting: Setting, folder: Path, say: Any = print) -> Any:
    """Read what the folder does not hold yet; a Dataset (cache, tokens)."""
    import numpy as np
    import xarray as xr

    columns = ("cpu_seconds", "resident_bytes", "peak_bytes", "state_bytes", "held")
    at = [*range(setting.every, setting.tokens, setting.every), setting.tokens]
    table = {name: np.full((len(setting.cache_sizes), len(at)), np.nan) for name in columns}
    folder.mkdir(parents=True, exist_ok=True)
    for c, size in enumerate(setting.cache_sizes):
        kept, rows = folder / f"read-{size}-{setting.tokens}.json", []
        if not kept.exists():
            for row in readings(reader(setting, size), setting):
                rows.append(row)
                say(f"N {size}, {row['tokens']} tokens: {row['cpu_seconds']:.0f} s, "
                    f"{row['resident_bytes'] / 2**20:.1f} MiB resident, {row['state_bytes'] / 2**20:.2f} MiB of state")
            atomic.write_bytes(kept, json.dumps(rows).encode())
        for row in json.loads(kept.read_text()):
            for name in columns:
                table[name][c, at.index(int(row["tokens"]))] = row[name]
    dataset = xr.Dataset({name: (("cache", "tokens"), values) for name, values in table.items()},
                         {"cache": list(setting.cache_sizes), "tokens": at})  # fmt: skip
    dataset["cpu_seconds"].attrs["units"] = "s"
    for name in columns[1:4]:
        dataset[name].attrs["units"] = "bytes"
    return dataset.assign_attrs(setting=asdict(setting), experiment="hmlab.experiments.hmt_latency")


def main(arguments: list[str] | None = None) -> int:
    """`python -m hmlab.experiments.hmt_latency`."""
    options = parser(__doc__, ["HMT"], "hmt_latency")
    options.add_argument("question", choices=("latency", "read"))
    options.add_argument("--cache-sizes", nargs="+", type=int, default=list(Setting.cache_sizes), help="N of `read`")
    given = options.parse_args(arguments)
    if given.question == "latency":
        return conduct(lambda say: latency(Setting(), say), given.output)
    setting = Setting(cache_sizes=tuple(given.cache_sizes))
    return conduct(lambda say: read(setting, given.folder, say), given.output)


if __name__ == "__main__":
    raise SystemExit(main())
