"""The files of data/claims, and counting."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hmlab.assets import assets_root
from hmlab.claims.measure import ClaimError
from hmlab.claims.schema import Claim, Ledger, Reach, Word
from hmlab.claims.verdict import WORDS, Verdict

PAPERS = ("LMN", "HARMONY", "HMT")
_REACH = "reach.toml"


def load(folder: Path | None = None) -> list[Claim]:
    """Every entry: of the three papers in their order, then controls."""
    folder = _folder(folder)
    claims: list[Claim] = []
    for path in sorted(folder.glob("*.toml")):
        if path.name != _REACH:
            claims += _read(path, Ledger).claim
    known: set[str] = set()
    for claim in claims:
        if claim.id in known:
            raise ClaimError(f"{claim.id}: expected one entry, got two")
        known.add(claim.id)
    for claim in claims:
        if claim.of is not None and claim.of not in known:
            raise ClaimError(f"{claim.id}: expected an entry {claim.of} that it is a reading of, found none")
    order = (*PAPERS, "control")
    return sorted(claims, key=lambda claim: order.index(claim.paper))


def reach(folder: Path | None = None) -> dict[str, float]:
    """What there is here, of what a claim may need."""
    return dict(_read(_folder(folder) / _REACH, Reach).reach)


def published_count(claims: Sequence[Claim]) -> int:
    """Claims of the papers: without further readings and controls."""
    return sum(_counted(claim) for claim in claims)


def counts(claims: Sequence[Claim], verdicts: Mapping[str, Verdict], paper: str | None = None) -> dict[Word, int]:
    """The papers' claims by verdict, every verdict among them."""
    chosen = [claim for claim in claims if _counted(claim) and paper in (None, claim.paper)]
    return {word: sum(verdicts[claim.id].word == word for claim in chosen) for word in WORDS}


def _counted(claim: Claim) -> bool:
    return claim.of is None and claim.paper != "control"


def _folder(folder: Path | None) -> Path:
    return assets_root() / "data" / "claims" if folder is None else folder


def _read(path: Path, model: type[BaseModel]) -> Any:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ClaimError(f"{path.name}: {error}") from None
    for entry in content.get("claim", ()):
        entry.setdefault("paper", content.get("paper"))
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = list(first["loc"])
        if place[:1] == ["claim"] and len(place) > 1:
            entries = content["claim"]
            place[:2] = [entries[place[1]].get("id", f"entry {place[1]}")]
        raise ClaimError(f"{path.name}: {'.'.join(map(str, place))}: {first['msg']}") from None
