"""The Memorizing Transformer: one attention layer of a model also looks into a memory of past keys and values.

Source: Wu, Rabe, Hutchins and Szegedy 2022, Memorizing Transformers (arXiv 2203.08913), section 3.

    model = MemorizingTransformer(backbone, MemorizingTransformer.Config(size=8192, picks=32))
    out = model(input_ids, attention_mask, labels)          # Output(loss, logits, state)
    out = model(more, state=out.state)                      # goes on in the next segment

    local_t  = the layer's own attention, to the tokens of the segment up to t
    memory_t = Σ_j softmax_j(τ_h q̂_t · k̂_j) v_j   over the K best of the M pairs (k̂, v) held,   q̂ = q / |q|, k̂ = k / |k|
    out_t    = g_h memory_t + (1 - g_h) local_t,   g_h = sigmoid(gate_h)

Symbols: K `picks`, M `size`, h a head of queries, `gate` b_g of the paper. A row is read segment by segment, positions
begin anew in each; then the segment's pairs, one per token and head of keys, go into the memory and the oldest out,
first in first out. A segment sees pairs of earlier segments only. No gradient goes into what is held.

Queries and keys are taken before they are rotated: what is retrieved has no position. The search is exact, over
`SEARCHED` pairs at a time. Rows are packed to the left, so that padding may lie anywhere and a row's segments are its
own tokens. A call ends its last segment: chunks of whole segments compute what one call computes, others do not.

Where this departs from the paper: the backbone is a trained model of transformers with its own positions, and not one
with relative ones trained from scratch; local attention ends at the segment, no cache of the previous segment is read;
queries and keys are normalised for the memory alone, as local attention must stay what the backbone learned, and τ is
learned per head, from sqrt(head_dim) on; an empty memory leaves local_t as it is, g or not; the gate begins where the
memory has a share of 0.12, not where training from scratch begins; with heads that share keys, pairs are held once.

Observed (batch, time, heads, picks): `retrieval_index`, the token retrieved, numbered in the row from 0, -1 for none;
`retrieval_score`, τ q̂ · k̂; and (batch, time, heads) `gate`. time counts the row's tokens, padding left out.
Families: those of `hmlab.hf`. Errors: `ValueError` naming the argument.
"""

from .lookup import SEARCHED, Config, Lookup, State
from .network import MemorizingTransformer, Output

__all__ = ["SEARCHED", "Config", "Lookup", "MemorizingTransformer", "Output", "State"]
