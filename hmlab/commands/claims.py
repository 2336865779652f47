"""`hmlab claims`: what the papers claim, and what the stored results say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmlab.commands.output import Json, print_json, print_table, say
from hmlab.commands.settings import Refusal
from hmlab.registry import UnknownName

if TYPE_CHECKING:
    from hmlab.claims import Claim, Verdict


def claims(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Entries, each test shown.")] = None,
    paper: Annotated[str | None, typer.Option(help="LMN, HARMONY, HMT or control.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict, such as reproduced or not-attempted.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Add new verdicts to the history.")] = False,
    json: Json = False,
) -> None:
    """Compute verdicts from stored results; exit 1 if a registered one no longer follows, or a control fails."""
    from hmlab import claims as ledger
    from hmlab.claims.verdict import WORDS

    entries = ledger.load()
    chosen = _chosen(entries, ids or [], paper)
    word = (verdict or "").replace("-", " ")
    if verdict is not None and word not in WORDS:
        raise UnknownName("verdict", verdict, WORDS)
    history = ledger.History()
    verdicts = ledger.judge(chosen)
    added = history.record(chosen, verdicts) if record else []
    drifted = ledger.drift(entries, verdicts, history)
    failed = [claim.id for claim in chosen if claim.expected not in (None, verdicts[claim.id].word)
              and all(outcome.installed for outcome in verdicts[claim.id].outcomes)]  # fmt: skip
    shown = [claim for claim in chosen if word in ("", verdicts[claim.id].word)]
    counts = ledger.counts(chosen, verdicts)
    at_our_scale = sum(verdicts[c.id].at_our_scale for c in chosen if c.of is None and c.paper != "control")
    total, every = sum(counts.values()), ledger.published_count(entries)
    background = [claim.id for claim in chosen if claim.background]
    computed = sum(verdicts[c.id].computed for c in chosen if c.of is None and c.paper != "control")
    if json:
        print_json({
            "claims": [_fields(claim, verdicts[claim.id]) for claim in shown], "counts": counts, "total": total,
            "published": every, "background": len(background), "computed": computed, "at_our_scale": at_our_scale,
            "recorded": added, "drift": [vars(gone) for gone in drifted], "failed_controls": failed,
        })  # fmt: skip
    else:
        if ids:
            for claim in shown:
                _print_entry(claim, verdicts[claim.id])
        else:
            print_table(("id", "verdict", "value", "interval", "accepted", "claim"),
                        [_row(claim, verdicts[claim.id]) for claim in shown])  # fmt: skip
        print()
        print_table(("verdict", "claims", f"of {total}"), [(w, n, _share(n, total)) for w, n in counts.items()])
        print(f"\n{computed} of {total} claims have a computed verdict, {at_our_scale} of them at our scale. "
              f"{len(background)} are background, {sum(verdicts[name].computed for name in background)} of these "
              f"computed. {every} are published.")  # fmt: skip
    for claim in added:
        say(f"recorded: {claim} {verdicts[claim].text}")
    for gone in drifted:
        say(f"hmlab: {gone.claim}: registered as {gone.registered}, now {gone.now}; changed: "
            f"{', '.join(gone.changed) or 'nothing that is recorded'}")  # fmt: skip
    for name in failed:
        say(f"hmlab: control {name}: expected {_of(chosen, name).expected}, computed {verdicts[name].word}")
    if drifted or failed:
        raise typer.Exit(1)


def _chosen(entries: Sequence[Claim], ids: Sequence[str], paper: str | None) -> list[Claim]:
    known = {claim.id for claim in entries}
    for name in ids:
        if name not in known:
            raise UnknownName("claim", name, known)
    papers = {claim.paper.lower(): claim.paper for claim in entries}
    if paper is not None and paper.lower() not in papers:
        raise UnknownName("paper", paper, set(papers.values()))
    chosen = [claim for claim in entries if not ids or claim.id in ids or claim.of in ids]
    chosen = [claim for claim in chosen if paper is None or claim.paper == papers[paper.lower()]]
    if not chosen:
        raise Refusal(f"claims: none of {', '.join(ids)} is of {paper}")
    return chosen


def _of(chosen: Sequence[Claim], name: str) -> Claim:
    return next(claim for claim in chosen if claim.id == name)


def _row(claim: Claim, verdict: Verdict) -> tuple[Any, ...]:
    outcome = verdict.deciding
    if outcome is None or not outcome.seeds:
        return (claim.id, verdict.text, None, None, claim.accept and str(claim.accept), claim.says)
    return (claim.id, verdict.text, outcome.value, _interval(outcome.low, outcome.high), str(outcome.accept),
            claim.says)  # fmt: skip


def _print_entry(claim: Claim, verdict: Verdict) -> None:
    published = claim.published and f"{claim.published.value:.10g} {claim.published.unit}"
    facts = {
        "claim": claim.says, "place": claim.place, "kind": f"{claim.kind}, {claim.stance}",
        "conditions": claim.conditions, "published": published, "quantity": claim.quantity,
        "accepted": claim.accept and str(claim.accept), "own scale": claim.scale.own,
        "our scale": claim.scale.ours, "verdict": verdict.text, "reason": verdict.reason,
    }  # fmt: skip
    print_table((claim.id, ""), [(name, text) for name, text in facts.items() if text])
    if verdict.outcomes:
        rows = [(o.about, o.word, o.value, _interval(o.low, o.high), str(o.accept), o.noise, o.seeds, o.p_value)
                if o.seeds else (o.about, o.word, None, None, str(o.accept), None, None, None)
                for o in verdict.outcomes]  # fmt: skip
        print_table(("test", "verdict", "value", "interval", "accepted", "noise", "seeds", "p"), rows)
    if verdict.sources:
        print_table(("from", "sha256"), [(name, digest[:12]) for name, digest in verdict.sources.items()])
    print()


def _fields(claim: Claim, verdict: Verdict) -> Mapping[str, Any]:
    entry = claim.model_dump(mode="json", exclude={"test"})
    outcomes = [{**vars(outcome), "accept": outcome.accept.model_dump()} for outcome in verdict.outcomes]
    return {**entry, "verdict": verdict.text, "word": verdict.word, "at_our_scale": verdict.at_our_scale,
            "reason": verdict.reason, "tests": outcomes, "sources": dict(verdict.sources)}  # fmt: skip


def _interval(low: float, high: float) -> str:
    return f"{low:.5g} to {high:.5g}" if high > low else "exact"


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %" if total else "-"
