"""The authors' side of the Logarithmic Memory Network: their checkpoint layout and their formulation.

The formulation holds the whole memory `[batch, time, 1 + K·levels, dim]` and projects every copy of every node; it
is kept as what parity and speed are measured against, and is used for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hmlab.model import Config as ModelConfig
from hmlab.model import LanguageModel

from .network import Config, LogarithmicMemory

_NAMES = (
    (r"token_embedding_table\.(.*)", r"embedding.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.(summarizer|qkv|out_proj)\.(.*)", r"blocks.\1.memory.\2.\3"),
    (r"blocks\.(\d+)\.feedforward\.(.*)", r"blocks.\1.feedforward.\2"),
    (r"ln_f\.(.*)", r"norm.\1"),
    (r"lm_head\.(.*)", r"head.\1"),
)


def load_authors_state(state_dict: Mapping[str, Tensor], *, heads: int = 4) -> LanguageModel:
    """A model from a checkpoint in the layout of the authors' code; everything but `heads` is read from its shapes.

    Raises ValueError naming keys that are not of that layout, or missing.
    """
    translated, unknown = {}, []
    for key, value in state_dict.items():
        for pattern, name in _NAMES:
            if re.fullmatch(pattern, key):
                translated[re.sub(pattern, name, key)] = value
                break
        else:
            unknown.append(key)
    needed = ("token_embedding_table.weight", "blocks.0.summarizer.weight", "blocks.0.feedforward.0.weight")
    missing = [key for key in needed if key not in state_dict]
    if unknown or missing:
        raise ValueError(f"state_dict: not the authors' layout; unknown keys {unknown}, missing keys {missing}")
    vocab, dim = state_dict["token_embedding_table.weight"].shape
    hidden = state_dict["blocks.0.feedforward.0.weight"].shape[0]
    layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
    memory = Config(dim=dim, heads=heads, banks=state_dict["blocks.0.summarizer.weight"].shape[0])
    size = {"ffn": "square"} if hidden == dim else {"ffn": "wide", "ffn_factor": hidden // dim}
    model = ModelConfig(vocab=vocab, dim=dim, layers=layers, memory=memory, **size).build()
    lacking, surplus = model.load_state_dict(translated, strict=False)
    if lacking or surplus:
        raise ValueError(f"state_dict: not the authors' layout; missing {lacking}, unknown {surplus}")
    return model


def published_forward(memory: LogarithmicMemory, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
    """What `memory(x)` computes, as the paper writes it (sections 3.3.1 and 3.4).

    Every level is repeated to the length of the sequence, all copies are projected, masked where the memory is
    zero, and each position attends over its own copy. Only for the two-child linear summarizer.
    """
    time, dim = x.shape[1:]
    heads, weight, bias = memory.config.heads, memory.summarizer.weight, memory.summarizer.bias
    level, slots = x[:, None].expand(-1, memory.config.banks, -1, -1), [x[:, :, None]]
    for i in range(1, time.bit_length()):
        pairs = level[:, :, : level.shape[2] // 2 * 2].unflatten(2, (-1, 2)).flatten(3)
        level = pairs @ weight + bias  # [batch, banks, nodes, dim]
        repeated = level.repeat_interleave(2**i, dim=2)
        # A node is seen from the end of its span on, so it is shifted by its span less one.
        aligned = F.pad(repeated, (0, 0, 2**i - 1, 2**i))[:, :, :time]
        slots.append(aligned.transpose(1, 2))
    held = torch.cat(slots, 2)
    filled = held != 0
    query, key, value = ((part * filled).unflatten(-1, (heads, -1)) for part in memory.qkv(held).chunk(3, -1))
    score = query.transpose(2, 3) @ key[:, :, 0, :, :, None] / (dim // heads) ** 0.5  # [batch, time, heads, slots, 1]
    score = score.squeeze(-1).masked_fill(~filled.any(-1)[:, :, None], -torch.inf)
    read = score.softmax(-1)[:, :, :, None] @ value.transpose(2, 3)
    return memory.out_proj(read.flatten(2))
