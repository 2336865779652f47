"""The ledger: what the papers claim, and what the stored results say of it.

    claims = load()                                # data/claims/*.toml
    verdicts = judge(claims)                       # from data/results, and from the library where arithmetic decides
    counts(claims, verdicts)                       # by verdict; the total is the denominator

An entry fixes, before anything is run, a quantity and the region it must lie in. The quantity is a small declarative
query, never code in a string (`schema`), evaluated over seeds (`measure`); the verdict follows from where the interval
of the quantity lies (`verdict`). No verdict is typed. What is run smaller than the paper says "at our scale".

    reproduced       the interval lies in the region
    direction only   it lies in the weaker region that gives the paper the sign and not the size
    contradicted     it lies outside
    inconclusive     it lies across the edge, or within what repeats of the same thing differ by
    blocked by scale the claim takes what `data/claims/reach.toml` says is not here, and no smaller test is given
    not attempted    no result to compute it from
    background       about other systems, and not tested

Intervals are 95 % bootstrap intervals of the mean over seeds, widened by the noise that A/A repeats show; with three
seeds that is from the least to the greatest, which holds the mean of a symmetric distribution three times in four.
`history` keeps every verdict that was registered, and every region before there were numbers; it is only added to.

Errors: ClaimError, one line that names file, entry and field.
"""

from hmlab.claims.history import History, HistoryError, drift
from hmlab.claims.ledger import ClaimError, counts, load, published_count, reach
from hmlab.claims.measure import Missing, Sample, Tables
from hmlab.claims.schema import Claim, Region
from hmlab.claims.verdict import Outcome, Verdict, judge, judge_one

__all__ = ["Claim", "ClaimError", "History", "HistoryError", "Missing", "Outcome", "Region", "Sample", "Tables",
           "Verdict", "counts", "drift", "judge", "judge_one", "load", "published_count", "reach"]  # fmt: skip
