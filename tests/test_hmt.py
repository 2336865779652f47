"""HMT round transformers' models and our own: one result however the text is cut, no leak, gradients that end."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hmt_models import ALL, ATTENDING, RECURRENT, SMALL, VOCAB, backbone, text, wrapped

from hmlab import hf
from hmlab.memories.harmony import HierarchyConfig
from hmlab.memory import clone, load_state, save_state, state_bytes
from hmlab.record import record
from hmlab.wrappers.hmt import HMT, recompute, sources
from hmlab.wrappers.rmt import rmt

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def plain_segments(model, ids, length):
    """The backbone on one segment after another, nothing between them."""
    read = [model(part) for part in ids.split(length, 1)]
    return torch.cat([out[0] if isinstance(out, tuple) else out.logits for out in read], 1)


@pytest.fixture(params=ALL)
def family(request):
    return request.param


@torch.no_grad()
def test_without_memories_it_is_the_backbone_per_segment(family):
    hmt = HMT(backbone(family), HMT.Config(segment_length=8, sensory=0, memories=0, query="none")).eval()
    ids = text(2, 29)
    expected = plain_segments(hmt.backbone, ids, 8)
    assert torch.equal(hmt(ids).logits, expected) or family == "mamba2"
    torch.testing.assert_close(hmt(ids).logits, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_segment_is_what_the_specification_says():
    """One segment after another, written out for a Llama: summary, recall, segment."""
    hmt = wrapped("llama", key_norm=False)
    model, embed = hmt.backbone.base_model, hmt.backbone.get_input_embeddings()
    ids, memories, logits = text(1, 40), [], []
    for n, part in enumerate(ids.split(8, 1)):
        prompt = hmt.memory[None]
        before = ids[:, 8 * (n - 1) : 8 * n] if n else ids[:, :0]
        if n:
            t = hmt.summary[None]
            summary = model(inputs_embeds=torch.cat((t, embed(before[:, -4:]), t), 1)).last_hidden_state[:, -1:]
            held = torch.cat(memories[-4:], 1)
            scores = hmt.recall.query(summary) @ hmt.recall.key(held).mT / math.sqrt(16)
            prompt = scores.softmax(-1) @ held
        x = torch.cat((prompt, embed(before[:, -3:]), embed(part), prompt), 1)
        hidden = model(inputs_embeds=x).last_hidden_state
        first = x.shape[1] - 9
        logits.append(hmt.backbone.lm_head(hidden[:, first : first + 8]))
        memories.append(hidden[:, -1:])
    out = hmt(ids)
    torch.testing.assert_close(out.logits, torch.cat(logits, 1), **CLOSE)
    # The fifth memory has taken the first one's place.
    torch.testing.assert_close(out.state.cache[0, :, 0], torch.cat(memories, 1)[0, [4, 1, 2, 3]], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("query", ["previous", "none"])
def test_any_chunking_equals_one_call(family, query):
    hmt, ids = wrapped(family, query=query), text(2, 53)
    whole = hmt(ids)
    state, pieces, begin = None, [], 0
    for size in (1, 6, 1, 0, 16, 9, 1, 1, 18):
        out = hmt(ids[:, begin : begin + size], state=state)
        state, begin = out.state, begin + size
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, **CLOSE)
    for name in ("cache", "keys", "count", "ids", "length", "last", "prompt"):
        torch.testing.assert_close(getattr(state, name), getattr(whole.state, name), **CLOSE)


@torch.no_grad()
def test_the_published_query_takes_whole_segments_only():
    hmt, ids = wrapped(query="prefix"), text(2, 40)
    whole, state, pieces = hmt(ids), None, []
    for begin, end in ((0, 16), (16, 24), (24, 40)):
        out = hmt(ids[:, begin:end], state=state)
        state = out.state
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, **CLOSE)
    inside = hmt(ids[:, :12]).state
    with pytest.raises(ValueError, match="input_ids: expected to begin with a segment"):
        hmt(ids[:, 12:], state=inside)
    with pytest.raises(ValueError, match="query: expected 'previous' or 'none' to write"):
        hmt.generate(ids, max_new_tokens=1)


@torch.no_grad()
@pytest.mark.parametrize("query", ["previous", "prefix"])
def test_batched_summaries_equal_those_made_one_by_one(family, query):
    def summaries(at_once):
        hmt, seen = wrapped(family, query=query, representations=at_once), []
        hook = hmt.recall.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        hmt(text(2, 61))
        hook.remove()
        return torch.stack(seen)

    batched, single = summaries(32), summaries(1)
    assert batched.shape[0] == 8 and batched[2:].any(-1).all()  # the first two need none
    torch.testing.assert_close(batched, single, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_cache_is_a_ring():
    hmt, ids = wrapped(cache_size=4), text(1, 8 * 11)
    states = [hmt(ids[:, : 8 * n]).state for n in range(1, 12)]
    every = HMT(hmt.backbone, HMT.Config(**SMALL | {"cache_size": 99})).eval()
    for n, state in enumerate(states, 1):
        assert state.cache.shape[1] == min(n, 4) and state.count.item() == n
        held = sources(state.count, state.cache.shape[1])[0]
        assert sorted(held.tolist()) == list(range(max(0, n - 4), n))
    assert every(ids).state.cache.shape[1] == 11
    # Each slot holds what was pushed when its segment closed.
    for n, state in enumerate(states[:-1]):
        for slot, source in enumerate(sources(states[-1].count, 4)[0].tolist()):
            if source == n:
                torch.testing.assert_close(states[-1].cache[0, slot], state.cache[0, n % 4], **CLOSE)


@torch.no_grad()
def test_memory_does_not_grow_with_the_text(family):
    """Everything that lives across a call is the state, and its bytes stop growing."""
    hmt = wrapped(family)
    state = hmt.prefill(text(1, 8 * 8))
    size = state_bytes(state)
    for seed in range(1, 4):
        state = hmt.prefill(text(1, 8 * 40, seed=seed), state)
        assert state_bytes(state) == size


PEAK = """
import resource, torch
from hmt_models import text, wrapped
hmt = wrapped("llama", segment_length=32, sensory=8)
hmt.prefill(text(1, 6_000))
first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hmt.prefill(text(1, 60_000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first)
"""


def test_peak_memory_is_flat_from_6k_to_60k_tokens(tmp_path):
    """KiB of the process; logits of 54,000 more tokens alone would be 13 MB."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 1024


def gradient_to_memories(hmt, ids, n, query):
    """Of the loss of segment n, to each earlier segment's memory as it was pushed."""
    pushed, push = [], hmt._push

    def kept(cache, keys, count, memories, closes):
        memories = memories.clone()
        if memories.requires_grad:
            memories.retain_grad()
        pushed.append(memories)
        return push(cache, keys, count, memories, closes)

    hmt._push = kept
    try:
        labels = torch.full_like(ids, -100)
        labels[:, 8 * n + 1 : 8 * n + 8] = ids[:, 8 * n + 1 : 8 * n + 8]
        hmt(ids, labels=labels, query=query).loss.backward()
    finally:
        del hmt._push
    return [0.0 if m.grad is None else m.grad.abs().max().item() for m in pushed]


@pytest.mark.parametrize("query", ["previous", "prefix", "none"])
@pytest.mark.parametrize("family", ["llama", "lmn", "mamba"])
def test_truncation_truly_truncates(family, query):
    """Blocks of three segments: the loss of segment 5 reaches the memories of 3 and 4, and none before."""
    hmt = wrapped(family, bptt_segments=3, query="previous")
    found = gradient_to_memories(hmt, text(2, 8 * 7), 5, query)
    assert found[:3] == [0.0] * 3
    assert found[4] > 0 and (found[3] > 0 or query == "none")
    free = gradient_to_memories(wrapped(family, bptt_segments=99), text(2, 8 * 7), 5, query)
    assert all(value > 0 for value in free[:5])


def test_w_k_learns_from_memories_beyond_the_cut():
    hmt = wrapped(bptt_segments=3)
    labels = text(1, 8 * 4).masked_fill(torch.arange(32) < 25, -100)  # the first segment of the second block
    hmt(text(1, 8 * 4), labels=labels).loss.backward()
    assert hmt.recall.key.weight.grad.abs().max() > 0
    assert hmt.memory.grad is None or not hmt.memory.grad.any()


def test_one_memory_teaches_recall_nothing():
    hmt = wrapped()
    own = {"query": hmt.recall.query.weight, "key": hmt.recall.key.weight, "summary": hmt.summary}

    def gradients(segments):
        hmt.zero_grad()
        ids = text(1, 8 * segments)
        hmt(ids, labels=ids).loss.backward()
        return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in own.items()}

    assert gradients(2) == dict.fromkeys(own, 0.0)
    assert all(value > 0 for value in gradients(3).values())
    two = hmt(text(1, 16)).state  # P of the second segment is the first one's memory
    torch.testing.assert_close(two.prompt[0], two.cache[0, 0], **CLOSE)


def test_training_recall_on_two_segments_is_refused():
    hmt, ids = wrapped().train(), text(1, 16)
    with pytest.raises(ValueError, match="input_ids: expected at least 3 segments of 8 tokens to train recall, got 2"):
        hmt(ids, labels=ids)
    hmt(ids, labels=ids, query="none").loss.backward()
    hmt(ids, labels=ids, state=hmt(text(1, 24)).state).loss.backward()  # what was read before counts
    with torch.no_grad():
        hmt(ids)
    with pytest.raises(ValueError, match="cache_size: expected 2 or more to train recall"):
        wrapped(cache_size=1).train()(text(1, 40), labels=text(1, 40))
    wrapped(cache_size=1)(text(1, 40))
    hmt.recall.requires_grad_(False)
    hmt(ids, labels=ids).loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("query", ["previous", "none"])
def test_the_honest_query_does_not_leak(family, query):
    """Whatever token changes, nothing before it does, to the bit; with the published one it does."""
    hmt, ids = wrapped(family, query=query), text(1, 40)
    before = hmt(ids).logits
    for t in (3, 8, 15, 16, 17, 30, 39):
        other = ids.clone()
        other[0, t] = 2 + (ids[0, t] - 1) % (VOCAB - 2)
        after = hmt(other).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@torch.no_grad()
def test_the_published_query_leaks():
    hmt, ids = wrapped(query="prefix"), text(1, 40)
    other = ids.clone()
    other[0, 19] = 2 + (ids[0, 19] - 1) % (VOCAB - 2)  # in the first half of the third segment
    assert not torch.equal(hmt(other).logits[:, 16:19], hmt(ids).logits[:, 16:19])
    other = ids.clone()
    other[0, 21] = 2 + (ids[0, 21] - 1) % (VOCAB - 2)  # in its second half
    assert torch.equal(hmt(other).logits[:, :21], hmt(ids).logits[:, :21])


@torch.no_grad()
@pytest.mark.parametrize("query", ["previous", "prefix", "none"])
def test_a_row_alone_equals_the_row_padded_in_a_batch(family, query):
    hmt = wrapped(family, query=query)
    lengths, time = (43, 40, 17, 5, 0), 43
    ids = text(len(lengths), time)
    valid = torch.arange(time) >= time - torch.tensor(lengths)[:, None]
    out = hmt(ids.masked_fill(~valid, 0), valid.long())
    for n, length in enumerate(lengths):
        assert not out.logits[n, : time - length].any()
        alone = hmt(ids[n : n + 1, time - length :])
        torch.testing.assert_close(out.logits[n, time - length :], alone.logits[0], **CLOSE)
        assert out.state.count[n] == length // 8
        if length >= 8:
            slots = alone.state.cache.shape[1]
            torch.testing.assert_close(out.state.cache[n, :slots], alone.state.cache[0], **CLOSE)


@torch.no_grad()
def test_what_stands_at_padding_does_not_matter():
    hmt, ids = wrapped(), text(2, 30)
    valid = torch.rand(2, 30) > 0.3  # anywhere
    one, two = hmt(ids, valid), hmt(ids.where(valid, 5), valid)
    assert torch.equal(one.logits, two.logits) and torch.equal(one.state.cache, two.state.cache)
    packed = hmt(ids[:1, valid[0]]).logits
    torch.testing.assert_close(one.logits[:1, valid[0]], packed, **CLOSE)


@torch.no_grad()
def test_writing_crosses_segments_without_a_seam(family):
    """Greedy, two boundaries further, two rows at different places: what a full recomputation would choose."""
    hmt = wrapped(family)
    ids, lengths = text(2, 13), (13, 6)
    valid = torch.arange(13) >= 13 - torch.tensor(lengths)[:, None]
    written, state = hmt.generate(ids.masked_fill(~valid, 0), attention_mask=valid, max_new_tokens=20)
    for n, length in enumerate(lengths):
        row = ids[n : n + 1, 13 - length :]
        for token in written[n]:
            assert hmt(row).logits[0, -1].argmax() == token
            row = torch.cat((row, token.view(1, 1)), 1)
        assert state.tokens(8)[n] == length + 20  # all that was written is remembered
        torch.testing.assert_close(state.cache[n, : (length + 20) // 8], hmt(row).state.cache[0], **CLOSE)


@torch.no_grad()
def test_writing_goes_on_where_it_stopped():
    hmt, ids = wrapped(), text(2, 11)
    whole, _ = hmt.generate(ids, max_new_tokens=15)
    first, state = hmt.generate(ids, max_new_tokens=6)
    second, state = hmt.generate(None, state=state, max_new_tokens=9)
    assert torch.equal(torch.cat((first, second), 1), whole)
    stream = hmt.stream(ids, max_new_tokens=4)
    assert torch.equal(torch.stack(list(stream), 1), whole[:, :4])
    assert torch.equal(hmt.generate(None, state=stream.state, max_new_tokens=11)[0], whole[:, 4:])


@torch.no_grad()
def test_a_row_that_ends_is_left_alone():
    hmt, ids = wrapped(), text(2, 11)
    whole, _ = hmt.generate(ids, max_new_tokens=12)
    end = int(whole[0, 3])
    lengths = [(row == end).nonzero()[0, 0].item() + 1 if (row == end).any() else 12 for row in whole]
    unseen = next(token for token in range(VOCAB) if token not in whole)
    several, _ = hmt.generate(ids, max_new_tokens=12, eos_token_id=[end, unseen])
    written, state = hmt.generate(ids, max_new_tokens=12, eos_token_id=end)
    assert torch.equal(several, written)
    for n, length in enumerate(lengths):
        assert torch.equal(written[n, :length], whole[n, :length]) and (written[n, length:] == end).all()
        assert state.tokens(8)[n] == 11 + length


@torch.no_grad()
def test_sampling_is_of_the_models_distribution():
    hmt, ids = wrapped(), text(1, 11)
    expected = (hmt(ids).logits[0, -1] / 2.0).softmax(-1)
    rows = ids.expand(4000, -1)
    written, _ = hmt.generate(rows, max_new_tokens=1, temperature=2.0, generator=torch.Generator().manual_seed(1))
    found = written[:, 0].bincount(minlength=VOCAB) / 4000
    assert (found - expected).abs().max() < 5 * 0.5 / 4000**0.5
    few, _ = hmt.generate(rows, max_new_tokens=1, temperature=2.0, top_k=3)
    assert set(few[:, 0].tolist()) <= set(expected.topk(3).indices.tolist())
    nucleus, _ = hmt.generate(rows, max_new_tokens=1, temperature=2.0, top_p=0.3)
    ranked, order = expected.sort(descending=True)
    assert set(nucleus[:, 0].tolist()) <= set(order[: int((ranked.cumsum(0) < 0.3).sum()) + 1].tolist())


@pytest.mark.parametrize("how", ["elementwise", "segments"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "lmn"])
def test_checkpointed_gradients_are_the_plain_ones(family, how, monkeypatch):
    ids, made = text(2, 41), []
    monkeypatch.setattr(recompute, "LEAST", 1)
    for name, again in recompute._AGAIN.items():
        counted = lambda node, again=again, name=name: made.append(name) or again(node)  # noqa: E731
        monkeypatch.setitem(recompute._AGAIN, name, counted)

    def gradients(**fields):
        hmt = wrapped(family, **fields).train()
        hmt(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in hmt.named_parameters() if p.grad is not None}

    expected, got = gradients(), gradients(checkpoint=how)
    assert expected.keys() == got.keys() and {"summary", "memory", "recall.key.weight"} <= expected.keys()
    exact = how == "elementwise"
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7)
    wanted = {"llama": {"MulBackward0", "SiluBackward0"}, "gpt_neox": {"GeluBackward0"}}
    assert not exact or wanted.get(family, set()) <= set(made)


@pytest.mark.parametrize("family", ATTENDING)
def test_the_loss_is_that_of_the_logits(family):
    """With labels of the user's own, padding, and in the last segment alone; gradients too."""
    hmt, ids = wrapped(family), text(2, 29)
    valid = torch.arange(29) >= torch.tensor([[0], [9]])
    labels = ids.masked_fill((torch.arange(29) % 3 == 0) | ~valid, -100)
    logits = hmt(ids, valid).logits
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    loss = hmt(ids, valid, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    weights = [p for p in hmt.parameters() if p.requires_grad]
    for got, wanted in zip(torch.autograd.grad(loss, weights, allow_unused=True),
                           torch.autograd.grad(expected, weights, allow_unused=True), strict=True):  # fmt: skip
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    last = hmt(ids[:1], labels=ids[:1], loss_on="last").loss  # the 25th token and on
    wanted = F.cross_entropy(hmt(ids[:1]).logits[0, 24:28], ids[0, 25:29])
    torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_states_are_values(tmp_path, family):
    hmt, ids = wrapped(family), text(2, 60)
    state = hmt(ids[:, :21]).state
    kept = clone(state)
    expected = hmt(ids[:, 21:], state=state).logits
    hmt(text(2, 30, seed=3), state=state)
    assert torch.equal(hmt(ids[:, 21:], state=state).logits, expected)  # as it was
    save_state(kept, tmp_path / "state.safetensors")
    loaded = load_state(hmt.init_state(2), tmp_path / "state.safetensors")
    assert torch.equal(hmt(ids[:, 21:], state=loaded).logits, expected)
    rows = torch.tensor([1, 0, 1])
    chosen = hmt(ids[rows, 21:], state=hmt.reorder(state, rows)).logits
    torch.testing.assert_close(chosen, expected[rows], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("keys", ["mean", "each"])
def test_more_than_one_memory(keys):
    hmt = wrapped(memories=3, keys=keys)
    ids = text(2, 45)
    out = hmt(ids)
    assert out.state.cache.shape[2] == 3 and out.state.keys.shape[2] == (1 if keys == "mean" else 3)
    state, pieces = None, []
    for part in ids.split(7, 1):
        step = hmt(part, state=state)
        state = step.state
        pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), out.logits, **CLOSE)


@torch.no_grad()
def test_recall_is_recorded():
    hmt, ids = wrapped(), text(2, 8 * 7)
    with record(hmt.recall) as recording:
        out = hmt(ids)
    seen = recording.dataset()
    weights, source = seen["recall_weight"].sel(layer=0), seen["provenance"].sel(layer=0)
    assert weights.dims == ("batch", "time", "slots", "memories") and weights.sizes["time"] == 7
    total = weights.fillna(0).sum(("slots", "memories")).values
    assert total[:, 0].tolist() == [0, 0] and abs(total[:, 1:] - 1).max() < 1e-6
    assert source.values[0, 6].tolist() == [4, 5, 2, 3] and source.values[0, 2].tolist() == [0, 1, -1, -1]
    assert torch.equal(hmt(ids).logits, out.logits)


@torch.no_grad()
def test_the_cache_may_lie_elsewhere():
    """On the device that is named; the numbers are the same."""
    ids, plain = text(2, 60), wrapped()
    hmt = HMT(plain.backbone, HMT.Config(**SMALL | {"cache_device": "cpu"})).eval()
    hmt.load_state_dict(plain.state_dict())
    out = hmt(ids)
    assert out.state.cache.device.type == "cpu"
    assert torch.equal(out.logits, plain(ids).logits)


@torch.no_grad()
def test_half_precision_keeps_recall_in_float32():
    hmt = HMT(backbone("llama").bfloat16(), HMT.Config(**SMALL)).eval()
    assert {p.dtype for p in hmt.memory_parameters()} == {torch.float32}
    out = hmt(text(2, 40))
    assert out.logits.dtype == out.state.cache.dtype == torch.bfloat16 and out.state.keys.dtype == torch.float32
    exact = HMT(backbone("llama"), HMT.Config(**SMALL)).eval()
    exact.load_state_dict(hmt.state_dict())
    wanted = exact(text(2, 40)).logits
    assert (out.logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@torch.no_grad()
def test_our_models_are_read_in_either_dress():
    """`hf.as_causal_lm` round a LanguageModel is the LanguageModel; with memories in place of attention, none is."""
    plain, ids = wrapped("lmn"), text(2, 30)
    dressed = HMT(hf.as_causal_lm(plain.backbone), plain.config).eval()
    own = {name: value for name, value in plain.state_dict().items() if not name.startswith("backbone")}
    dressed.load_state_dict(dressed.state_dict() | own)
    assert torch.equal(dressed(ids).logits, plain(ids).logits)
    attached = hf.attach(backbone("llama"), HierarchyConfig(window=4))
    with pytest.raises(ValueError, match="backbone: expected the model's own attention"):
        HMT(attached, HMT.Config(**SMALL))


@torch.no_grad()
def test_layers_that_see_a_window_see_their_own_row():
    """Sliding windows count columns: rows that stand at different places have no gap between past and new tokens."""
    hmt = wrapped("mistral", segment_length=16)
    ids, valid = text(2, 30), torch.arange(30) >= torch.tensor([[0], [7]])
    state, pieces = None, []
    for part in (slice(0, 12), slice(12, 13), slice(13, 27), slice(27, 30)):
        out = hmt(ids[:, part], valid[:, part], state=state)
        state = out.state
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[1, 7:], hmt(ids[1:, 7:]).logits[0], **CLOSE)


@torch.no_grad()
def test_a_call_of_padding_changes_nothing(family):
    hmt, ids = wrapped(family), text(2, 21)
    state = hmt(ids).state
    out = hmt(ids[:, :5], torch.zeros(2, 5, dtype=torch.bool), state=state)
    assert out.logits.shape == (2, 5, VOCAB) and not out.logits.any()
    assert torch.equal(hmt(ids[:, :6], state=out.state).logits, hmt(ids[:, :6], state=state).logits)
    padded = torch.nn.functional.pad(ids, (0, 8 * 16 * 2))
    behind = hmt.prefill(padded, attention_mask=torch.arange(padded.shape[1]).expand(2, -1) < 21)
    torch.testing.assert_close(behind.last, state.last, **CLOSE)


@pytest.mark.unchecked
@torch.no_grad()
def test_small_integers_and_half_precision_are_taken():
    hmt, ids = wrapped(), text(1, 40)
    exact = hmt(ids)
    assert torch.equal(hmt(ids.to(torch.uint8)).logits, exact.logits)
    loss = hmt(ids.int(), labels=ids.to(torch.uint8)).loss
    torch.testing.assert_close(loss, hmt(ids, labels=ids).loss)
    with torch.autocast("cpu", torch.float16):
        half = hmt(ids)
    assert half.logits.isfinite().all() and half.state.keys.dtype == torch.float32
    assert copy.deepcopy(hmt).bfloat16()(ids).logits.isfinite().all()


def test_a_past_that_the_backbone_does_not_keep_is_refused():
    hmt, ids = wrapped(), text(1, 21)
    hmt.backbone.activation_checkpointing_enable()
    hmt.train()
    hmt(text(1, 24), labels=text(1, 24)).loss.backward()
    with pytest.raises(ValueError, match="backbone: expected one that keeps its past"):
        hmt(ids, query="none")
    assert hmt.eval()(ids).state.past.layers


def test_rmt_hands_its_memory_on():
    model, ids = rmt(backbone("llama"), segment_length=8, memories=2).eval(), text(1, 24)
    assert not hasattr(model, "recall")
    base, embed, memory, logits = model.backbone.base_model, model.backbone.get_input_embeddings(), model.memory, []
    memory = memory[None]
    with torch.no_grad():
        for part in ids.split(8, 1):
            hidden = base(inputs_embeds=torch.cat((memory, embed(part), memory), 1)).last_hidden_state
            logits.append(model.backbone.lm_head(hidden[:, 2:-2]))
            memory = hidden[:, -2:]
        torch.testing.assert_close(model(ids).logits, torch.cat(logits, 1), **CLOSE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_length": 0}, "segment_length: expected at least 1, got 0"),
        ({"sensory": 9}, "sensory: expected at most segment_length"),
        ({"memories": 0}, "memories: expected 1 or more for recall"),
        ({"query": "next"}, "query: expected one of previous, prefix, none, got 'next'"),
        ({"fraction": 0.0}, "fraction: expected 0 < fraction <= 1, got 0.0"),
        ({"checkpoint": "all"}, "checkpoint: expected one of"),
        ({"recall_dim": 0}, "recall_dim: expected at least 1 or None, got 0"),
        ({"segment_length": 60}, "segment_length: expected segment_length"),
    ],
)
@pytest.mark.unchecked
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HMT(backbone("llama"), HMT.Config(**SMALL | fields))


@pytest.mark.unchecked
def test_bad_calls_are_refused():
    hmt, ids = wrapped(), text(2, 20)
    with pytest.raises(ValueError, match="input_ids: expected integers"):
        hmt(ids.float())
    with pytest.raises(ValueError, match="attention_mask: expected"):
        hmt(ids, torch.ones(2, 40))
    with pytest.raises(ValueError, match="labels: expected"):
        hmt(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="loss_on: expected all or last, got 'first'"):
        hmt(ids, labels=ids, loss_on="first")
    with pytest.raises(ValueError, match="state: expected 2 rows, as input_ids has, got 1"):
        hmt(ids, state=hmt.init_state(1))
    for other in (wrapped(memories=2), wrapped(cache_size=8), wrapped(query="none"), wrapped(segment_length=16)):
        with pytest.raises(ValueError, match="state: expected one of this configuration"):
            hmt(ids, state=other(text(2, 90)).state)
    with pytest.raises(ValueError, match="state: expected an HMT's State, got Output"):
        hmt(ids, state=hmt(ids))
    from transformers import BertConfig, BertLMHeadModel

    bert = BertLMHeadModel(BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=16, is_decoder=True))  # fmt: skip
    with pytest.raises(ValueError, match="backbone: expected logits as the head gives them"):
        HMT(bert, HMT.Config(**SMALL))
    with pytest.raises(ValueError, match="query: expected one of none, got 'previous'"):
        wrapped(query="none")(ids, query="previous")
    with pytest.raises(ValueError, match="ids: expected at least one token"):
        hmt.generate(ids[:, :0], max_new_tokens=3)
    with pytest.raises(ValueError, match="evaluation mode"):
        copy.deepcopy(hmt).train().generate(ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="temperature: expected"):
        hmt.generate(ids, max_new_tokens=3, temperature=-1.0)
    with pytest.raises(ValueError, match="backbone: expected a causal language model"):
        HMT(torch.nn.Linear(3, 3), HMT.Config())
    recurrent = wrapped(next(iter(RECURRENT)))
    state = recurrent(ids[:, :12]).state
    with pytest.raises(ValueError, match="state: expected whole segments where gradients are wanted"):
        recurrent(ids, labels=ids, state=state)
