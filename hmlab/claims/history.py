"""Registered verdicts, one JSON object a line, each with the hash of the line before: only ever added to.

    sha256 = of the line's other fields;  previous = sha256 of the line before, 64 zeros at first

`definition` is the hash of what the verdict is computed by (regions, queries, scale). What has no numbers yet is
registered as well, so that a region that is moved before or after the fact shows. Lines at the end that go missing
cannot be seen here; a checkout knows.

Errors: HistoryError naming the line.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hmlab import atomic
from hmlab.assets import assets_root
from hmlab.claims.schema import Claim
from hmlab.claims.verdict import AT_OUR_SCALE, COMPUTED, Verdict
from hmlab.provenance import checkout

FIRST = "0" * 64


class HistoryError(ValueError):
    """The history was edited."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A registered verdict that no longer follows, or an entry that is another now.

    changed: results, functions or the entry itself, as far as they differ from what was registered.
    """

    claim: str
    registered: str
    now: str
    changed: tuple[str, ...]


class History:
    """The file of registered verdicts; `entries` is checked when it is read."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = assets_root() / "data" / "claims_history.jsonl" if path is None else path
        self.entries: list[dict[str, Any]] = []
        before = FIRST
        for number, line in enumerate(self._text().splitlines(), 1):
            try:
                entry = json.loads(line)
                own = entry.pop("sha256")
            except (json.JSONDecodeError, KeyError, AttributeError):
                raise HistoryError(f"{self.path.name}, line {number}: expected an entry with its hash") from None
            if entry.get("previous") != before or _digest(entry) != own:
                raise HistoryError(f"{self.path.name}, line {number}: expected what was registered, found it changed")
            self.entries.append(entry)
            before = own
        self._last = before

    def latest(self) -> dict[str, dict[str, Any]]:
        """Of each entry of the ledger the verdict registered last."""
        return {entry["claim"]: entry for entry in self.entries}

    def record(self, claims: Sequence[Claim], verdicts: Mapping[str, Verdict]) -> list[str]:
        """Add what is not registered as it is now; the ids of it."""
        latest, (commit, dirty) = self.latest(), checkout()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines, added = [], []
        for claim in claims:
            held, facts = latest.get(claim.id), _facts(claim, verdicts[claim.id])
            known = held is not None and all(held[name] == value for name, value in facts.items())
            if known or not _installed(verdicts[claim.id]):
                continue
            entry = {"claim": claim.id, **facts, **_numbers(verdicts[claim.id]), "date": now, "commit": commit,
                     "dirty": dirty, "previous": self._last}  # fmt: skip
            self._last = _digest(entry)
            self.entries.append(entry)
            lines.append(json.dumps({**entry, "sha256": self._last}, ensure_ascii=False, allow_nan=False))
            added.append(claim.id)
        if lines:
            atomic.write_bytes(self.path, (self._text() + "".join(f"{line}\n" for line in lines)).encode())
        return added

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.is_file() else ""


def drift(claims: Sequence[Claim], verdicts: Mapping[str, Verdict], history: History) -> list[Drift]:
    """Registered verdicts that do not follow now, or that other regions or queries have been given since.

    What needs a library that is not installed here, or was not judged, is passed over.
    """
    known, found = {claim.id: claim for claim in claims}, []
    for name, held in history.latest().items():
        if name not in known:
            found.append(Drift(claim=name, registered=held["verdict"], now="no such entry", changed=("entry",)))
            continue
        if name not in verdicts:
            continue
        facts = _facts(known[name], verdicts[name])
        # What had no numbers may get some.
        follows = held["verdict"] == facts["verdict"] or not _computed(held["verdict"])
        if not _installed(verdicts[name]) or (follows and held["definition"] == facts["definition"]):
            continue
        sources = sorted(held["sources"].keys() | facts["sources"].keys())
        changed = [source for source in sources if held["sources"].get(source) != facts["sources"].get(source)]
        changed += ["entry"] if held["definition"] != facts["definition"] else []
        found.append(Drift(claim=name, registered=held["verdict"], now=facts["verdict"], changed=tuple(changed)))
    return found


def _facts(claim: Claim, verdict: Verdict) -> dict[str, Any]:
    defining = claim.model_dump(mode="json", include={"accept", "direction", "test", "scale", "published"})
    return {"verdict": verdict.text, "definition": _digest(defining), "sources": dict(verdict.sources)}


def _numbers(verdict: Verdict) -> dict[str, Any]:
    outcome = verdict.deciding
    if outcome is None or not math.isfinite(outcome.value):
        return {"value": None, "low": None, "high": None, "seeds": 0}
    return {"value": outcome.value, "low": outcome.low, "high": outcome.high, "seeds": outcome.seeds}


def _computed(text: str) -> bool:
    return text.removesuffix(AT_OUR_SCALE) in COMPUTED


def _installed(verdict: Verdict) -> bool:
    return all(outcome.installed for outcome in verdict.outcomes)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
