"""What an entry of the ledger is made of. Unknown fields and wrong types are refused; nothing here computes.

An entry's `accept` is the region that its quantity must lie in, fixed before the quantity is computed; `direction` is
the weaker region in which the paper has the sign right and not the size.

A measure is one of

    { result = NAME, column = C, where = {..}, ... }       rows of a table in data/results
    { published = NAME, column = C, where = {..} }         one number of a table in data/published
    { function = NAME, arguments = {..} }                  a function of `hmlab.claims.computed` or `texts`
    { number = X }
    { difference = [A, B] }, { ratio = [A, B] }, { least = [A, B, ..] }, { most = [A, B, ..] }    of measures

Source of the claims: the papers named in each file of data/claims. Errors: ValidationError naming entry and field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Paper = Literal["LMN", "HARMONY", "HMT", "control"]
Word = Literal["reproduced", "direction only", "contradicted", "inconclusive", "blocked by scale", "not attempted",
               "background"]  # fmt: skip
Scalar = bool | int | float | str
Need = Literal["devices", "trained_parameters", "pretrained_parameters", "energy_meters", "hardware_counters"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Region(Strict):
    """Numbers from low to high, both belonging to it; at least one is given."""

    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Region:
        low, high = self.bounds
        if (self.low is None and self.high is None) or not low <= high:
            raise ValueError(f"region: expected low, high or both, low <= high, got {self.low} and {self.high}")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        return (float("-inf") if self.low is None else self.low, float("inf") if self.high is None else self.high)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.10g}"
        if self.low is not None and self.high is not None:
            return f"{self.low:.10g} to {self.high:.10g}"
        return f">= {self.low:.10g}" if self.low is not None else f"<= {self.high:.10g}"


class Between(Strict):
    """Rows whose value lies from least to most."""

    least: float | None = None
    most: float | None = None


class Rows(Strict):
    """Rows of a stored table. where: value, values or range of dims and variables.

    seeds: the dim whose values are repeats; None: a single one. Within a repeat rows are grouped by `by`, each group
    becomes one number by `reduce`, and the groups their mean: "only": all rows hold the same number; "mean", "least",
    "most"; "exponent": slope of log column over log `along`; "at": interpolated where `along` is `at`; "spread":
    most over least.
    noise: variable with the A/A noise, as share of the value. quartiles: variables with those of an exponent's column.
    """

    result: str
    column: str
    where: dict[str, Scalar | list[Scalar] | Between] = Field(default_factory=dict)
    seeds: str | None = None
    by: list[str] = Field(default_factory=list)
    reduce: Literal["only", "mean", "least", "most", "exponent", "at", "spread"] = "only"
    along: str | None = None
    at: float | None = None
    noise: str | None = None
    quartiles: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> Rows:
        if (self.reduce in ("exponent", "at")) != (self.along is not None):
            raise ValueError(f"along: expected with exponent and at only, got {self.along!r} with {self.reduce}")
        if (self.reduce == "at") != (self.at is not None):
            raise ValueError(f"at: expected with reduce = \"at\" only, got {self.at} with {self.reduce}")
        if self.reduce == "exponent" and (self.seeds or self.by):
            raise ValueError("exponent: expected neither seeds nor by")
        if self.quartiles and (self.reduce != "exponent" or len(self.quartiles) != 2):
            raise ValueError("quartiles: expected two names, with exponent only")
        return self


class Published(Strict):
    """One number that others reported."""

    published: str
    column: str
    where: dict[str, Scalar] = Field(default_factory=dict)


class Computed(Strict):
    """A named function of the library, without measuring time."""

    function: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Number(Strict):
    number: float


class Difference(Strict):
    """Seed by seed."""

    difference: list[Measure] = Field(min_length=2, max_length=2)


class Ratio(Strict):
    """Seed by seed."""

    ratio: list[Measure] = Field(min_length=2, max_length=2)


class Least(Strict):
    """The smallest of several, seed by seed."""

    least: list[Measure] = Field(min_length=2)


class Most(Strict):
    """The largest of several, seed by seed."""

    most: list[Measure] = Field(min_length=2)


_KINDS = {kind.__name__: kind for kind in (Rows, Published, Computed, Number, Difference, Ratio, Least, Most)}
_KEYS = {"result": "Rows", "function": "Computed"} | {name.lower(): name for name in _KINDS if name != "Rows"}


def _kind(value: Any) -> str | None:
    if isinstance(value, BaseModel):
        return type(value).__name__
    return next((kind for key, kind in _KEYS.items() if key in value), None) if isinstance(value, dict) else None


Measure = Annotated[
    Annotated[Rows, Tag("Rows")]
    | Annotated[Published, Tag("Published")]
    | Annotated[Computed, Tag("Computed")]
    | Annotated[Number, Tag("Number")]
    | Annotated[Difference, Tag("Difference")]
    | Annotated[Ratio, Tag("Ratio")]
    | Annotated[Least, Tag("Least")]
    | Annotated[Most, Tag("Most")],
    Discriminator(_kind),
]
for _combination in (Difference, Ratio, Least, Most):
    _combination.model_rebuild()


class Noise(Strict):
    """By how much the quantity differs where nothing should: the largest size of `of` over seeds ("size", for an A/A
    difference), or most less least of its seeds ("spread", for other runs of the same kind)."""

    of: Measure
    by: Literal["size", "spread"] = "size"


class Test(Strict):
    """quantity: what is computed. accept, direction: instead of the entry's. about: which part of the claim this is."""

    quantity: Measure
    about: str = ""
    accept: Region | None = None
    direction: Region | None = None
    noise: Noise | None = None


class Scale(Strict):
    """own: the claim's. ours: that of the test, "" if full. full: the test is at the claim's own scale.
    needs: what the claim's own scale takes; more than `reach.toml` says blocks an entry without a test."""

    own: str = ""
    ours: str = ""
    full: bool = False
    needs: dict[Need, float] = Field(default_factory=dict)


class Where(Strict):
    """What produces the result: a notebook with parameters, or a command."""

    notebook: str | None = None
    quick: dict[str, Any] = Field(default_factory=dict)
    full: dict[str, Any] = Field(default_factory=dict)
    command: str | None = None


class Value(Strict):
    value: float
    unit: str


class Claim(Strict):
    """One claim, or with `of` another reading of one, which is not counted.

    says: in our words. stance: asserted; expected: worded as a target; conjectured: future work. background: about
    other systems. quantity: what `accept` is about. expected: of a control, the verdict that a ledger which works gives
    it. why: what the verdict of an entry without a test rests on, where it needs words.
    """

    id: str = Field(pattern=r"^[A-Z]+\d+(-[a-z0-9-]+)?$")
    paper: Paper
    place: str
    says: str = Field(min_length=20)
    kind: Literal["value", "ratio", "ordering", "exponent", "existence"]
    stance: Literal["asserted", "expected", "conjectured"] = "asserted"
    background: bool = False
    of: str | None = None
    conditions: str = ""
    published: Value | None = None
    quantity: str = ""
    accept: Region | None = None
    direction: Region | None = None
    test: list[Test] = Field(default_factory=list)
    run: Where | None = None
    scale: Scale = Scale()
    expected: Word | None = None
    why: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        stated = self.accept is not None and bool(self.quantity)
        stated |= bool(self.test) and all(test.accept is not None and bool(test.about) for test in self.test)
        if not self.background and not stated:
            raise ValueError(f"{self.id}: expected a quantity and an accepted region, fixed before it is computed")
        if self.test and any((test.accept or self.accept) is None for test in self.test):
            raise ValueError(f"{self.id}: expected an accepted region for every test")
        if (self.expected is not None) != (self.paper == "control"):
            raise ValueError(f"{self.id}: expected names the verdict of a control, and of nothing else")
        if (self.of is not None) != ("-" in self.id) or (self.of and self.id.partition("-")[0] != self.of):
            raise ValueError(f"{self.id}: expected a reading to be called after the claim it is of, got {self.of}")
        if self.scale.full and self.scale.ours:
            raise ValueError(f"{self.id}: expected scale.ours without scale.full only")
        return self


class Ledger(Strict):
    """A file of data/claims; `paper` is that of all its entries."""

    paper: Paper
    claim: list[Claim]


class Reach(Strict):
    """What this project can run on."""

    reach: dict[Need, float]
