"""Functions that the ledger's entries name: what arithmetic, or a small model with random weights, decides.

No clock and no trained weights; every random number has a fixed seed. Each returns one number. Where a claim is about
cost, it is counted: vectors held, scores, parameters (of a summarizer each is multiplied once for every node).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from hmlab import auxiliary, hashing
from hmlab import model as models
from hmlab.memories import lmn
from hmlab.memory import state_bytes
from hmlab.record import record
from hmlab.registry import memory_config, model_config

_WIDTH = 8  # of layers whose vectors are counted
# Of models of transformers.
_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}  # fmt: skip


def parameters(model: str, dim: int, vocab: int = 65, settings: dict[str, str] | None = None) -> int:
    """Of a language model of four layers, by the name of a preset."""
    return models.parameters(model_config(model, dim=dim, vocab=vocab, settings=settings).build())


def summarizer_parameters(dim: int, settings: dict[str, Any] | None = None) -> int:
    """Of an LMN layer's summarizer."""
    return models.parameters(lmn.Config(dim=dim, **settings or {}).build().summarizer)


def reduction_factor(tokens: int) -> float:
    """n^2 / log2 n."""
    return tokens**2 / math.log2(tokens)


def vectors_held(memory: str, tokens: int, settings: dict[str, Any] | None = None) -> int:
    """Vectors of the width that a layer's state holds after so many tokens; counters rounded away."""
    layer = memory_config(memory)(dim=_WIDTH, heads=2, **settings or {}).build()
    with torch.no_grad():
        _, state = layer(torch.zeros(1, tokens, _WIDTH))
    return state_bytes(state) // (4 * _WIDTH)


def growth_of_vectors(memory: str, tokens: list[int], settings: dict[str, Any] | None = None, log: bool = False
                      ) -> float:
    """Exponent of `vectors_held` in the number of tokens, or in its binary logarithm; through the ends."""
    first, last = (vectors_held(memory, count, settings) for count in (tokens[0], tokens[-1]))
    spans = [math.log2(count) if log else count for count in (tokens[0], tokens[-1])]
    return math.log(last / first) / math.log(spans[1] / spans[0])


def scores_of_last(tokens: int, settings: dict[str, Any] | None = None) -> int:
    """Scores that the last of so many tokens computes in an LMN layer: nodes with a weight, by recording."""
    torch.manual_seed(0)
    layer = lmn.Config(dim=_WIDTH, heads=2, **settings or {}).build()
    with torch.no_grad(), record(layer) as recording:
        layer(torch.randn(1, tokens, _WIDTH))
    seen = recording.dataset()["attention"].isel(layer=0, batch=0, time=-1, heads=0)
    return int((seen > 0).sum())


def scores_from_logarithm(tokens: list[int], banks: int = 2) -> int:
    """Largest difference of `scores_of_last` to 1 + K floor(log2 t)."""
    return max(abs(scores_of_last(count, {"banks": banks}) - 1 - banks * (count.bit_length() - 1)) for count in tokens)


def growth_of_scores(tokens: list[int]) -> float:
    """Exponent, in the number of tokens, of the scores of a whole sequence in an LMN layer of one bank: its positions'
    1 + floor(log2 t); through the ends."""
    first, last = (sum(t.bit_length() for t in range(1, count + 1)) for count in (tokens[0], tokens[-1]))
    return math.log(last / first) / math.log(tokens[-1] / tokens[0])


def difference_of_modes(lengths: list[int], settings: dict[str, Any] | None = None) -> float:
    """Largest difference of LMN in parallel to LMN token by token, outputs of order one; float32."""
    torch.manual_seed(0)
    layer, worst = lmn.Config(dim=32, **settings or {}).build(), 0.0
    for length in lengths:
        x = torch.randn(1, length, 32)
        with torch.no_grad():
            whole, _ = layer(x)
            state, steps = layer.init_state(1), []
            for token in x.unbind(1):
                out, state = layer.step(token, state)
                steps.append(out)
        worst = max(worst, float((torch.stack(steps, 1) - whole).abs().max() / whole.std()))
    return worst


def difference_of_paths(levels: int) -> float:
    """Largest difference between a token's derivative in a node and the product of left and right factors along the
    bits of its offset, as a share of the largest; float64."""
    torch.manual_seed(0)
    layer, width = lmn.Config(dim=_WIDTH, heads=2, banks=1).build().double(), _WIDTH
    with torch.no_grad():
        layer.summarizer.weight.normal_(std=width**-0.5)
    x = torch.randn(1, 2**levels, width, dtype=torch.float64)
    # The last node of the state is the root.
    jacobian = torch.autograd.functional.jacobian(lambda z: layer(z)[1].nodes[0, -1], x)[:, 0]
    weight, worst = layer.summarizer.weight[0].detach(), 0.0
    for offset in range(2**levels):
        path = torch.eye(width, dtype=torch.float64)
        for level in range(levels):
            path = path @ weight[width * (offset >> level & 1) :][:width]
        worst = max(worst, float((jacobian[:, offset].T - path).abs().max()))
    return worst / float(jacobian.abs().max())


def sensitivity_to_order(memory: str = "lmn", settings: dict[str, Any] | None = None) -> float:
    """How much the last output of a layer without positions changes if two earlier tokens change places, as a share of
    its size; random weights."""
    torch.manual_seed(0)
    layer = memory_config(memory)(dim=32, **settings or {}).build()
    if memory == "lmn":  # it begins with summaries next to nothing
        torch.nn.init.normal_(layer.summarizer.weight, std=32**-0.5)
    x = torch.randn(1, 32, 32)
    turned = x.clone()
    turned[:, [3, 20]] = x[:, [20, 3]]
    with torch.no_grad():
        before, after = layer(x)[0][0, -1], layer(turned)[0][0, -1]
    return float((after - before).norm() / before.norm())


def share_with_gradient(memory: str, tokens: int, settings: dict[str, Any] | None = None,
                        auxiliary_losses: bool = False) -> float:
    """Of a layer's parameter tensors, those whose gradient is finite and not zero. The loss is the outputs' square, and
    what the layer asks for beside it if `auxiliary_losses`. Weights lie a little beside where training begins, since
    some begin at zero."""
    torch.manual_seed(0)
    layer = memory_config(memory)(dim=32, heads=2, **settings or {}).build().train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    ids = torch.randint(0, 50, (2, tokens))
    with auxiliary.collect() if auxiliary_losses else nullcontext({}) as asked:
        y, _ = layer(torch.randn(2, tokens, 32), tokens=ids)
    (y.square().sum() + sum(asked.values())).backward()
    reached = [p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any()) for p in layer.parameters()]
    return sum(reached) / len(reached)


def difference_of_attached(family: str) -> float:
    """Largest difference of the logits of a random model of transformers once HARMONY stands in for its attention, in
    one call; a slot for each token, all of them read, a window of 5 to 8; as a share of their deviation."""
    import transformers

    from hmlab import hf
    from hmlab.memories.harmony import HierarchyConfig

    torch.manual_seed(0)
    sizes = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes)).eval()
    config = HierarchyConfig(window=5, segment=4, sinks=2, ratios=(1,), budget=1.0, retrieval="all", capacity=4096)
    ids = torch.randint(2, 61, (1, 60))
    with torch.no_grad():
        before = model(ids).logits
        after = hf.attach(model, config)(ids).logits
    return float((after - before).abs().max() / before.std())


def recall_of_memory(shuffled: bool, facts: int = 128, values: int = 32) -> float:
    """Share of facts that HARMONY's manager reads back: a random key each, a value out of `values`, behind the window,
    every token kept, slots found by hash. shuffled: the values that it holds change places before it is read."""
    from hmlab.memories.harmony.manager import Config
    from hmlab.memories.harmony.storage import FixedRatio

    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(1, facts, 1, values, generator=generator), dim=-1) * 40
    answers = torch.randint(values, (facts,), generator=generator)
    config = Config(heads=1, dim=values, window=32, segment=32, sinks=0, capacity=2 * facts, picks=4)
    manager = config.build(ratio=FixedRatio(1), family=hashing.hyperplane.Config(dim=values, tables=16).build())
    filler = torch.randn(1, 96, 1, values, generator=generator)  # drives the last fact out of the window
    held = F.one_hot(answers, values)[None, :, None].float()
    manager.write(torch.cat((keys, filler), 1), torch.cat((held, 0 * filler), 1))
    if shuffled:
        medium = manager.state.medium
        held = medium.usage.held[0].nonzero()[:, 0]
        v = medium.slots.v.clone()
        v[0, held] = v[0, held[torch.randperm(len(held), generator=generator)]]
        manager.state = manager.state._replace(medium=medium._replace(slots=medium.slots._replace(v=v)))
    found = torch.stack([manager.read(key).out[0, 0].argmax() for key in keys[0].unsqueeze(1).unbind(0)])
    return float((found == answers).double().mean())


def families_wrapped(families: list[str]) -> int:
    """Of kinds of language models of transformers, random and tiny: those that HMT goes round, with a finite loss and a
    gradient that reaches memory, recall and backbone."""
    import transformers

    from hmlab.wrappers.hmt import HMT

    gated = {"intermediate_size": 48, "num_key_value_heads": 2}
    inner = {"llama": gated, "qwen2": gated, "gpt_neox": {"intermediate_size": 48}, "opt": {"ffn_dim": 48},
             "mamba": {"state_size": 4}}  # fmt: skip
    reached = 0
    for family in families:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **_SIZES, **inner[family])
        backbone = transformers.AutoModelForCausalLM.from_config(config)
        hmt = HMT(backbone, HMT.Config(segment_length=8, sensory=3, cache_size=4, recall_dim=16))
        ids = torch.randint(2, 61, (1, 40))
        loss = hmt(ids, labels=ids).loss
        loss.backward()
        parts = (hmt.memory, hmt.recall.query.weight, backbone.get_input_embeddings().weight)
        reached += bool(loss.isfinite()) and all(p.grad is not None and bool(p.grad.any()) for p in parts)
    return reached


def searched_beyond_the_cache() -> int:
    """Entries that HMT's recall weighs at a segment, less the memories of the segments before it; 3 sensory tokens and
    a short-term memory are held at that time. Recorded, round a small LMN."""
    from hmlab.wrappers.hmt import HMT

    torch.manual_seed(0)
    backbone = models.Config(vocab=61, dim=32, layers=1, memory=lmn.Config(dim=32, heads=2)).build()
    hmt = HMT(backbone, HMT.Config(segment_length=8, sensory=3, cache_size=16, recall_dim=16)).eval()
    segments = 6
    with torch.no_grad(), record(hmt.recall) as recording:
        hmt(torch.randint(0, 61, (1, 8 * segments)))
    weights = recording.dataset()["recall_weight"].isel(layer=0, batch=0, time=-1)
    return int(weights.notnull().sum()) - (segments - 1)


FUNCTIONS: dict[str, Callable[..., float]] = {
    function.__name__: function for function in (
        parameters, summarizer_parameters, reduction_factor, vectors_held, growth_of_vectors, scores_of_last,
        scores_from_logarithm, growth_of_scores, difference_of_modes, difference_of_paths, sensitivity_to_order,
        share_with_gradient, difference_of_attached, recall_of_memory, families_wrapped, searched_beyond_the_cache,
    )
}  # fmt: skip
