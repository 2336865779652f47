"""HARMONY: a memory hierarchy that compresses by entropy and addresses by hashing.

Source: Akbar 2025, HARMONY: Hierarchical Adaptive Retrieval with Memory Optimization for Neural Systems. The paper is a
blueprint; where it gives no equation, the one here is ours.

    y_t = W_o concat_h Σ_j softmax_j( q_t · k_j + bias_j ) v_j + b_o,     q = s · W_q x / |W_q x|,   k = W_k x / |W_k x|

over the j that are sinks, tokens of the window of t, or slots picked for t.

Short term: the last W to W + S - 1 tokens and the first few of the document, exactly (`hierarchy`).
Medium term: behind the window every segment of S tokens is S / r slots, r by a policy that looks at how dense the
segment is (`compression`, `medium_term`); the oldest are forgotten once the tier is full.
Addressing: codes of learned hyperplanes, or of any other family; k slots for a query, or for a block of queries
(`retriever`, `sharing`). Every token is in exactly one place: sink, window or slots.

`replay` gives the same weights other choices and `attribute` says what codes and compression cost; `retrieval_quality`
measures what codes find. `manager` holds the tiers token by token, for what only a stream can do: other evictions,
promotion, the disk, adaptive buckets, repair of what was missed or compressed too much.

Symbols: E dim, H heads, D = E / H, W window, S segment, r ratio, s scale of scores (one for each key head, learned).
Forward and step are one function. The state holds 2 · (W + S - 2 + sinks) vectors of a key head, S - 1 keys of the
unfinished segment, 2 vectors and their codes for each slot, and the counts that densities need.
"""

from .config import HierarchyConfig
from .hierarchy import Hierarchy
from .network import Config, Harmony
from .quality import retrieval_quality
from .replay import Attribution, attribute, replay
from .retriever import LSHRetriever
from .state import State

__all__ = ["Attribution", "Config", "Harmony", "Hierarchy", "HierarchyConfig", "LSHRetriever", "State", "attribute",
           "replay", "retrieval_quality"]  # fmt: skip
