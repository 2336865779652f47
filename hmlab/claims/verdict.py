"""From numbers to words: where the interval of a quantity lies against the region that was fixed before.

An entry with several tests is as good as its worst: contradicted if one is; else not attempted if one has no numbers;
else inconclusive, direction only, reproduced. A verdict from fewer or smaller runs than the paper's says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hmlab.claims.measure import ClaimError, Missing, Tables, evaluate, sources
from hmlab.claims.schema import Claim, Region, Test, Word
from hmlab.registry import UnknownName

# The worst first.
ORDER: tuple[Word, ...] = ("contradicted", "not attempted", "inconclusive", "direction only", "reproduced")
COMPUTED: tuple[Word, ...] = ("reproduced", "direction only", "contradicted", "inconclusive")
AT_OUR_SCALE = " at our scale"
WORDS: tuple[Word, ...] = (*COMPUTED, "blocked by scale", "not attempted", "background")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one test. value: mean over seeds; low, high: its interval, noise counted in; NaN where nothing is there.
    noise: half-width that repeats of the same thing show. installed: no library is missing."""

    word: Word
    about: str
    accept: Region
    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    seeds: int = 0
    noise: float = 0.0
    p_value: float | None = None
    reason: str = ""
    installed: bool = True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """at_our_scale: computed, but smaller than what the paper says. sources: what it follows from, with sha256."""

    claim: str
    word: Word
    at_our_scale: bool = False
    outcomes: tuple[Outcome, ...] = ()
    reason: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.word + AT_OUR_SCALE * self.at_our_scale

    @property
    def computed(self) -> bool:
        return self.word in COMPUTED

    @property
    def deciding(self) -> Outcome | None:
        """The outcome that gave the verdict."""
        return next((outcome for outcome in self.outcomes if outcome.word == self.word), None)


def judge(claims: Sequence[Claim], tables: Tables | None = None, reach: Mapping[str, float] | None = None
          ) -> dict[str, Verdict]:
    """The verdict of every entry, by id. reach: what is here, of what a claim may need; None: `reach.toml`."""
    from hmlab.claims import ledger

    tables, reach = tables or Tables(), ledger.reach() if reach is None else reach
    return {claim.id: judge_one(claim, tables, reach) for claim in claims}


def judge_one(claim: Claim, tables: Tables, reach: Mapping[str, float]) -> Verdict:
    """The verdict of an entry."""
    beyond = [f"{need} {least:g}, here {reach[need]:g}" for need, least in claim.scale.needs.items()
              if least > reach[need]]  # fmt: skip
    if not claim.test:
        if claim.background:
            return Verdict(claim=claim.id, word="background", reason=claim.why)
        if beyond:
            return Verdict(claim=claim.id, word="blocked by scale", reason="needs " + "; ".join(beyond))
        return Verdict(claim=claim.id, word="not attempted", reason=claim.why or "no experiment yet")
    outcomes = tuple(_outcome(claim, test, tables) for test in claim.test)
    word = min((outcome.word for outcome in outcomes), key=ORDER.index)
    reason = next((outcome.reason for outcome in outcomes if outcome.word == word), "")
    held = {}
    if word in COMPUTED:
        named = {source for test, outcome in zip(claim.test, outcomes, strict=True) if outcome.word in COMPUTED
                 for part in (test.quantity, *([test.noise.of] if test.noise else []))
                 for source in sources(part)}  # fmt: skip
        held = {source: tables.digest(source) for source in sorted(named)}
    return Verdict(claim=claim.id, word=word, at_our_scale=word in COMPUTED and not claim.scale.full,
                   outcomes=outcomes, reason=reason, sources=held)  # fmt: skip


def _outcome(claim: Claim, test: Test, tables: Tables) -> Outcome:
    accept = test.accept or claim.accept
    assert accept is not None  # the schema demands one
    direction = test.direction if test.accept else test.direction or claim.direction
    about = test.about or claim.quantity
    try:
        sample = evaluate(test.quantity, tables)
        floor = 0.0
        if test.noise:
            apart = list(evaluate(test.noise.of, tables).values.values())
            floor = max(map(abs, apart)) if test.noise.by == "size" else max(apart) - min(apart)
    except Missing as missing:
        return Outcome(word="not attempted", about=about, accept=accept, reason=str(missing),
                       installed=missing.installed)  # fmt: skip
    except (ClaimError, UnknownName) as error:
        raise ClaimError(f"{claim.id}: {error}") from None
    low, high = sample.interval(floor)
    return Outcome(
        word=placed(low, high, accept, direction), about=about, accept=accept, value=sample.mean, low=low, high=high,
        seeds=len(sample.values), noise=sample.noise + floor, p_value=sample.p_value,
    )  # fmt: skip


def placed(low: float, high: float, accept: Region, direction: Region | None = None) -> Word:
    """The word for an interval: inside the region, inside the weaker one, outside, or across an edge.

    Raises ValueError for an interval that is none.
    """
    if not low <= high:
        raise ValueError(f"interval: expected low <= high, got {low} and {high}")
    if _inside(low, high, accept):
        return "reproduced"
    if direction is not None and _inside(low, high, direction):
        return "direction only"
    bounds = (direction or accept).bounds
    return "contradicted" if high < bounds[0] or low > bounds[1] else "inconclusive"


def _inside(low: float, high: float, region: Region) -> bool:
    return region.bounds[0] <= low and high <= region.bounds[1]
