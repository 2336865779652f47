"""Models of transformers and memories: hierarchies in the place of attention, and memories as models.

    attach(model, HierarchyConfig(window=256, ratios=(16,)))     # the same object, its attention replaced
    attach(model, {4: window(256), 5: HierarchyConfig(), 6: lmn.Config(dim=512, heads=8)})   # in these layers
    model(**batch)   model.generate(**prompt)                    # as before, with a state that stops growing
    detach(model)                                                # the model as it was
    convert(model, layers, batches=..., held_out=..., steps=...)     # attach, train, compare before and after

    save(model, folder, include_model=True)                      # the model's own weights, and what came with attach
    model = AutoModelForCausalLM.from_pretrained(folder)
    load(model, folder)                                          # attached again, the weights of both as they were

Families: Llama, Qwen2, Qwen3, GPT-NeoX, OPT. What can stand in a layer:

- HARMONY's hierarchy (source: Akbar 2025, HARMONY), `HierarchyConfig`. The model's own weights stay in use and in
  place: the hierarchy gets the queries, keys and values that attention would get, before they are rotated. With
  `ratios=(1,), retrieval="all"` the model computes what it computed before, to rounding.
- a window, `window(256)`: the hierarchy without slots, which has no parameters.
- a Logarithmic Memory Network, `hmlab.memories.lmn.Config`, which takes over weights of the attention that it replaces
  (`hmlab.hf.logarithmic` says which). Its state grows by a node per bank when the text doubles.

It stands below each attention module as `hierarchy`, so its parameters are the model's: optimizers, `state_dict` and
`save_pretrained` see them, and transformers' `Trainer` resumes with them. Layers that are not chosen compute what they
computed, to the bit, on their keys and values in the same cache, with the same implementation of attention; packed rows
they tell apart as transformers does, without a mask and a cache.

Training: by the model's loss and what `hmlab.auxiliary.collect` gathers in the forward pass, everything or
`hierarchies(model)` alone. With activation checkpointing, which runs layers twice, the backward pass belongs inside
`collect` as well, and the price of a slot moves twice a step. Without training: `HierarchyConfig(policy="density",
codec="mean_pool", family="hyperplane", sinks=0)`, or other codecs and families that learn nothing.

How: `hmlab.hf.attention` is registered with transformers' `AttentionInterface`; it states why nothing of a model's code
is replaced. `hmlab.hf.cache` holds the states. Memories as models: `hmlab.hf.causal_lm`.
Limits: attention over the whole past in every layer (no sliding layers); rotary frequencies that do not depend on
the length; padding masks, not custom ones; positions that run on by one, or begin again at 0 with a new document; no
attention dropout; caches that begin as `DynamicCache`; no decoding that takes tokens back (assisted generation).
Errors: `ValueError` naming what was expected.
"""

from hmlab.hf.attachment import (
    FAMILIES,
    KINDS,
    ROTARY,
    Attached,
    attach,
    detach,
    hierarchies,
    load,
    save,
    window,
)
from hmlab.hf.causal_lm import HmlabForCausalLM, as_causal_lm, as_language_model
from hmlab.hf.configuration import HmlabConfig
from hmlab.hf.conversion import Conversion, convert
from hmlab.hf.tokenizer import as_tokenizer

__all__ = [
    "FAMILIES",
    "KINDS",
    "ROTARY",
    "Attached",
    "Conversion",
    "HmlabConfig",
    "HmlabForCausalLM",
    "as_causal_lm",
    "as_language_model",
    "as_tokenizer",
    "attach",
    "convert",
    "detach",
    "hierarchies",
    "load",
    "save",
    "window",
]
