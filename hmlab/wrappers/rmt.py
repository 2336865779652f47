"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881), as HMT without recall.

    M_n = hidden states of backbone([M_{n-1}; segment n; M_{n-1}]) at the last m places

A segment hands its memory to the next and nothing is searched: `HMT` with `query="none"`. The read places see nothing
of the segment, the write places see all of it. With `sensory` > 0 the last tokens of the segment before are read again,
which the published model does not do.
"""

from __future__ import annotations

from torch import nn

from hmlab.wrappers.hmt import HMT


def rmt(backbone: nn.Module, *, segment_length: int = 256, memories: int = 1, sensory: int = 0, bptt_segments: int = 6
        ) -> HMT:
    """The wrapper round a causal language model; fields as in `HMT.Config`."""
    return HMT(backbone, HMT.Config(segment_length=segment_length, memories=memories, sensory=sensory, query="none",
                                    cache_size=1, bptt_segments=bptt_segments))  # fmt: skip
