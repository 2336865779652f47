"""Hierarchical Memory Transformer: recurrence over segments with a searchable memory (arXiv 2405.06067).

    model = HMT(backbone, HMT.Config(segment_length=256))    # any causal language model
    out = model(input_ids, labels=input_ids)                  # .loss; without labels .logits; .state
    state = model.prefill(book)                               # flat memory, however long
    ids, state = model.generate(None, state=state, max_new_tokens=100)

A text is read in segments of b tokens. Of the n-th, [x; y] meaning one after the other:

    S_n = last hidden state of backbone([T; embed(some tokens); T])                                    summary
    P_n = sum_i softmax_i(W_q S_n · W_k M_i / sqrt(h)) M_i  over the last N memories; `memory` at first     recall
    [...; logits; M_n] = backbone([P_n; embed(last k tokens of segment n - 1); embed(segment n); P_n])      segment

so sensory memory are the k tokens, short-term memory is P_n, long-term memory the M_i; only the last is searched.

Which tokens the summary is made of is `query`:

- "previous" (default): the last j b of segment n - 1. No logits see a token that comes later.
- "prefix", as published: the first j b of segment n itself. Since P_n stands before them, the logits of those tokens
  have seen what they are to predict: a perplexity over them is not that of a language model. Tokens behind the first
  j b are predicted honestly; `perplexities` reports them apart.
- "none": no search, P_n = M_{n-1}: the Recurrent Memory Transformer (`hmlab.wrappers.rmt`).

Symbols: b segment_length, k sensory, j fraction, N cache_size, h recall_dim, m memories. Deviations: keys and queries
are normalised with a learned temperature unless `key_norm=False`, and W_k begins equal to W_q; m > 1 memories have one
key, of their mean, or one each; `bptt_segments` cuts the whole state off the graph; one scale in training and
generation; generated text is remembered. Source: the paper and measurements of its published code.

Errors: ValueError naming the argument.
"""

from hmlab.wrappers.hmt.config import Config, Output, State
from hmlab.wrappers.hmt.network import HMT, move
from hmlab.wrappers.hmt.recall import Recall, sources
from hmlab.wrappers.hmt.sizes import added_parameters

__all__ = ["HMT", "Config", "Output", "Recall", "State", "added_parameters", "move", "sources"]
