"""How far to look for each query: as many tables and probes as its margins make necessary.

A query far from all hyperplanes is found by its first codes; one close to them needs more. From the family's
`probe_probability` the probability of having found a vector of the wanted similarity after any set of probes is

    1 - Π_tables (1 - Σ_{probes taken in that table} P_probe)

and probes are taken, the likeliest of all tables first, until it reaches the target. Source: query-adaptive probing
after Lv et al. 2007 and Andoni et al. 2015 (§ multiprobe), with the stopping rule ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# The code of no bucket: a lookup finds nothing there.
NOWHERE = -(1 << 31)


def enough_probes(probability: Float[Tensor, "*queries tables probes"], target: float
                  ) -> tuple[Bool[Tensor, "*queries tables probes"], Float[Tensor, "*queries"]]:
    """The probes to look up so that each query reaches `target` recall, and the recall that it then has.

    probability: of finding the wanted vector in each probe, not rising along the probes of a table: what
    `probe_probability` gives, or the largest responsibilities of a mixture. All probes are taken where even they do
    not reach the target; one at least. Raises ValueError by argument.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target: expected above 0 and at most 1, got {target}")
    tables, probes = probability.shape[-2:]
    probability = probability.clamp(0, 1)
    missed = (1 - probability.cumsum(-1)).clamp(min=torch.finfo(probability.dtype).tiny).log()
    gain = (-missed).diff(dim=-1, prepend=torch.zeros_like(missed[..., :1]))
    order = probability.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    found = -torch.expm1(-gain.flatten(-2).gather(-1, order).cumsum(-1))
    # A probe is taken if those before it fell short.
    before = torch.nn.functional.pad(found[..., :-1], (1, 0))
    taken = before < target
    recall = found.gather(-1, taken.sum(-1, keepdim=True) - 1)[..., 0]
    mask = torch.zeros_like(taken).scatter(-1, order, taken)
    return mask.unflatten(-1, (tables, probes)), recall


def kept(codes: Int[Tensor, "*queries tables probes"], mask: Bool[Tensor, "*queries tables probes"]
         ) -> Int[Tensor, "*queries tables probes"]:
    """Codes to look up; those outside the mask name no bucket."""
    return codes.masked_fill(~mask, NOWHERE)
