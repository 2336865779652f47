"""Both candidates compute the same; the floor counts what torch counts; memory is that of the tensors."""

import dataclasses
import functools
import gc

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hmlab import bench, bench_hmt, results
from hmlab.bench_hmt import AuthorsLoop, Sizes, tensor_bytes

TINY = Sizes(width=32, layers=2, heads=2, mlp=40, vocab=50, segment_length=12, sensory=3, cache_size=2, recall_dim=24,
             depth=4, batch=2, read=5)  # fmt: skip


def both(*, recall: bool, sizes: Sizes = TINY):
    model = bench_hmt.hmt("cpu", sizes, recall=recall)
    return model, bench_hmt.authors(model)


def text(segments: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(TINY.vocab, (batch, segments * TINY.segment_length))


@pytest.mark.parametrize("recall", [True, False])
def test_candidates_compute_the_same_loss_logits_and_gradients(recall):
    """With more segments than the cache holds."""
    model, theirs = both(recall=recall)
    ids = text(TINY.depth)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
    gradients = []
    for one in (model, theirs):
        one.zero_grad()
        loss = one(ids, labels=ids).loss
        loss.backward()
        gradients.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, other in gradients[1].items():
        # Memories of an untrained model differ by six parts in a thousand, and recall learns from the products of two
        # such differences, of keys and of values: of float32's 1e-7 that leaves 3e-3.
        digits = 1e-2 if name == "summary" or name.startswith("recall") else 1e-5
        assert other.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], other, atol=digits * float(other.abs().max()), rtol=0)


def test_the_keys_of_the_authors_state():
    _, theirs = both(recall=True)
    keys = {key for key in theirs.state_dict() if not key.startswith("memory_cell.model.")}
    assert keys == {"memory_cell.mem", "memory_cell.memory", "cross_attn.wq.weight", "cross_attn.wk.weight"}
    assert [list(theirs.state_dict()[key].shape) for key in sorted(keys)] == [[24, 32], [24, 32], [1, 32], [1, 32]]
    _, alone = both(recall=False)
    assert {key for key in alone.state_dict() if "model." not in key} == {"memory_cell.memory"}


def test_the_loop_by_hand():
    """Two segments, the second one short: every step of the specification written out, its own tokens' logits."""
    _, theirs = both(recall=True)
    llama, ids = theirs.memory_cell.model, text(2)[:, :-4]
    embed, memory, T = llama.get_input_embeddings(), theirs.memory_cell.memory[0], theirs.memory_cell.mem[0]

    def read(before, ids, after):
        x = torch.cat([before, embed(ids), after[None, None].expand(len(ids), 1, -1)], 1)
        hidden = llama.model(inputs_embeds=x).last_hidden_state
        return hidden[:, -1 - ids.shape[1] : -1], hidden[:, -1]

    first = memory[None, None].expand(2, 1, -1)
    hidden, left = read(first, ids[:, :12], memory)
    torch.testing.assert_close(llama.lm_head(hidden), theirs(ids).logits[:, :12], atol=1e-5, rtol=0)
    # A cache of one entry: P is that entry, whatever S is.
    for row in range(2):
        hidden, _ = read(torch.cat([left[row : row + 1, None], embed(ids[row : row + 1, 9:12])], 1),
                         ids[row : row + 1, 12:], left[row])  # fmt: skip
        torch.testing.assert_close(llama.lm_head(hidden), theirs(ids).logits[row : row + 1, 12:], atol=1e-5, rtol=0)
    # Two entries: weights by S, from T, the first half of the segment, T.
    cache, new = torch.randn(2, 2, 32), ids[:, :8]
    _, summary = read(T[None, None].expand(2, 1, -1), new[:, :4], T)
    scores = torch.einsum("bh,bnh->bn", summary @ theirs.cross_attn["wq"].weight.T,
                          cache @ theirs.cross_attn["wk"].weight.T) / 24**0.5  # fmt: skip
    expected = torch.einsum("bn,bnd->bd", scores.softmax(1), cache)
    torch.testing.assert_close(theirs.recall(new, cache)[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.unchecked
def test_labels_of_another_shape_are_refused():
    _, theirs = both(recall=False)
    with pytest.raises(ValueError, match=r"labels: expected \[2, 24\], got \[2, 12\]"):
        theirs(text(2), text(1))


@pytest.mark.parametrize("recall", [True, False])
def test_flops_are_those_of_the_products(recall):
    """The loop's own, counted by torch; less S of the second segment, the head where no token is read, keys made again,
    and pairs not causal."""
    model, theirs = both(recall=recall)
    theirs.requires_grad_(False)
    model.backbone.set_attn_implementation("eager")  # whose products torch counts
    segments, batch, own = 5, 3, TINY.segment_length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(text(segments, batch))
    main = [own + 2] + [own + TINY.sensory + 2] * (segments - 1)
    excerpts = [own // 2 + 2] * (segments - 1) if recall else []
    entries = [min(n, TINY.cache_size) for n in range(1, segments)] if recall else []
    heads = sum(main) + sum(excerpts) - segments * own
    seen = sum(places * places - places * (places + 1) // 2 for places in main + excerpts)
    again = (sum(entries) - (segments - 1)) * TINY.width * TINY.recall_dim if recall else 0
    weights = 4 * TINY.width**2 + 3 * TINY.width * TINY.mlp
    for places in excerpts[:1]:
        again += TINY.layers * (places * weights + TINY.width * places * (places + 1))
    extra = heads * TINY.width * TINY.vocab + TINY.layers * 2 * TINY.width * seen + again
    expected = bench_hmt.flops(TINY, segments, batch, recall=recall) + 2 * batch * extra
    assert counter.get_total_flops() == expected


def test_bytes_are_of_tensors_that_live_at_once():
    kept, held = [], torch.zeros(10, 10)

    def call():
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100).t() * 2  # views hold no bytes of their own
        del b
        kept[:] = [c, held.t()]  # nor what was there before

    assert tensor_bytes(call) == 4000  # two of three at once, one of which stays, as one from before goes
    weight = torch.zeros(1000, requires_grad=True)

    def train():
        weight.grad = None
        (weight.exp() * 2).sum().backward()

    gc.collect()
    assert 8000 <= tensor_bytes(train) <= 12100  # exp is kept, its product and the gradients beside it


def test_keeping_everything_to_the_end_costs_what_it_should():
    """Evaluation: theirs grows by logits and hidden states, ours by neither."""
    model, theirs = both(recall=True)
    model.config = dataclasses.replace(model.config, representations=2)
    needs = {}
    for segments in (8, 16):
        ids = text(segments, 1)
        needs[segments] = [tensor_bytes(bench_hmt._evaluation(one, ids)) for one in (model, theirs)]
    ours, other = (needs[16][n] - needs[8][n] for n in range(2))
    tokens = 8 * TINY.segment_length
    assert other >= 4 * tokens * (2 * TINY.vocab + (TINY.layers + 1) * TINY.width)
    assert ours < 4 * tokens * TINY.width


def test_the_suite_measures_every_case_and_its_table_can_be_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_hmt, "cases", functools.partial(bench_hmt.cases, sizes=TINY))
    measured = bench.run(["hmt"], seconds=0.0)
    assert list(measured["candidate"].values) == ["hmlab", "authors"]
    assert list(measured["op"].values) == ["hmt training", "hmt training without recall", "hmt evaluation",
                                           "hmt evaluation without recall"]  # fmt: skip
    assert list(measured["length"].values) == [48, 48, 60, 60]
    flops = [3 * bench_hmt.flops(TINY, 4, 2, recall=recall) for recall in (True, False)]
    flops += [bench_hmt.flops(TINY, 5, 1, recall=recall) for recall in (True, False)]
    assert list(measured["flops"].values) == flops
    assert (measured["tensor_bytes"] > 0).all() and (measured["floor"] > 0).all()
    results.save("kept", measured.drop_vars("seconds"), {"device": "this one"}, folder=tmp_path)
    kept = results._read(tmp_path, "kept").sel(candidate=measured["candidate"], case=measured["case"])
    np.testing.assert_array_equal(kept["tensor_bytes"], measured["tensor_bytes"])


def test_parameters_are_shared_and_new_where_tensors_are_given():
    model, theirs = both(recall=True)
    assert theirs.memory_cell.memory is model.memory and theirs.cross_attn["wq"].weight is model.recall.query.weight
    loop = AuthorsLoop(model.backbone, None, torch.zeros(1, 32), None, None, segment_length=12)
    assert isinstance(loop.memory_cell.memory, torch.nn.Parameter)
