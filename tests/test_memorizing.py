"""The Memorizing Transformer: the backbone where nothing is held, and past pairs found, read and forgotten beyond."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_hf import CLOSE, FAMILIES, make, prompt

from hmlab import hf
from hmlab.memory import clone, load_state, save_state
from hmlab.record import record
from hmlab.wrappers import memorizing
from hmlab.wrappers.memorizing import MemorizingTransformer

SEGMENT = 6
SMALL = memorizing.Config(picks=3, size=20, segment_length=SEGMENT, gate=0.5)


def wrapped(family="llama", **fields):
    """A wrapper whose heads differ, and the backbone as it was before."""
    backbone = make(family)
    config = memorizing.Config(**{"picks": 3, "size": 20, "segment_length": SEGMENT, "gate": 0.5} | fields)
    model = MemorizingTransformer(copy.deepcopy(backbone), config).eval()
    with torch.no_grad():
        for weight in model.memory_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model, backbone


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def by_pieces(monkeypatch):
    """A search that takes several passes over what is held."""
    monkeypatch.setattr(memorizing.lookup, "SEARCHED", 7)


def test_a_segment_without_memory_is_the_backbone(family):
    """With nothing held whatever the gate; with all that is held and the gate shut."""
    model, backbone = wrapped(family)
    ids = torch.randint(2, 61, (2, 3 * SEGMENT - 2))
    with torch.no_grad():
        expected = torch.cat([backbone(part).logits for part in ids.split(SEGMENT, 1)], 1)
        torch.testing.assert_close(model(ids[:, :SEGMENT]).logits, expected[:, :SEGMENT], rtol=0, atol=0)
        assert not torch.allclose(model(ids).logits[:, SEGMENT:], expected[:, SEGMENT:], **CLOSE)
        model.lookup.gate.fill_(-torch.inf)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_memory_is_read_as_the_equation_says(family, attention, by_pieces):
    """The layer's output against softmax over all that is held, where as many are picked; written by itself."""
    model, _ = wrapped(family, picks=20, layer=1)
    model.backbone.set_attn_implementation(attention)
    layer, ids = hf.attachment.attentions(model.backbone)[1], torch.randint(2, 61, (2, 4 * SEGMENT))
    seen = []

    def projected(x):
        """Queries, keys and values `[batch, time, heads, dim]`, before rotation."""
        if family == "gpt_neox":
            return layer.query_key_value(x).unflatten(-1, (4, 24)).split(8, -1)
        size = layer.head_dim
        q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, size)) for name in ("q_proj", "k_proj", "v_proj"))
        if family == "qwen3":
            q, k = layer.q_norm(q), layer.k_norm(k)
        return (q, *(t.repeat_interleave(4 // t.shape[2], 2) for t in (k, v)))

    hooks = [layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]),
        with_kwargs=True), layer.register_forward_hook(lambda module, args, out: seen[-1].append(out[0]))]  # fmt: skip
    with torch.no_grad():
        model(ids)
        for hook in hooks:
            hook.remove()
        output = getattr(layer, {"gpt_neox": "dense", "opt": "out_proj"}.get(family, "o_proj"))
        inputs, outputs = zip(*seen, strict=True)
        shut = copy.deepcopy(model.lookup.gate)
        for number in range(1, 4):
            q, _, _ = projected(inputs[number])
            _, k, v = (t[:, -20:] for t in projected(torch.cat(inputs[:number], 1)))
            score = torch.einsum("bthd,bshd->bhts", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
            weight = (score * model.lookup.log_scale.exp()[:, None, None]).softmax(-1)
            read = torch.einsum("bhts,bshd->bthd", weight, v)
            # What local attention alone gives: the same layer, with the gate shut.
            model.lookup.gate.fill_(-torch.inf)
            local = _local(model, layer, inputs[number])
            model.lookup.gate.copy_(shut)
            gate = shut.sigmoid()[:, None]
            expected = output((gate * read + (1 - gate) * local).flatten(2))
            torch.testing.assert_close(outputs[number], expected, rtol=1e-4, atol=1e-4)


def _local(model, layer, x):
    """Causal attention of the layer, before its output projection, from what its own modules give."""
    inside = []
    output = next(getattr(layer, name) for name in ("o_proj", "out_proj", "dense") if hasattr(layer, name))
    hook = output.register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    decoder = hf.attachment.decoder_of(model.backbone)
    rotary = getattr(decoder, "rotary_emb", None)
    given = {} if rotary is None else {"position_embeddings": rotary(x, torch.arange(x.shape[1])[None])}
    mask = torch.ones(x.shape[1], x.shape[1]).tril().log()[None, None]
    layer(hidden_states=x, attention_mask=mask, **given)
    hook.remove()
    return inside[0].unflatten(-1, (4, -1))


def test_the_best_are_picked(by_pieces):
    """Against sorting all scores; the rest has no weight."""
    lookup = memorizing.Lookup(SMALL, heads=4, head_dim=8)
    q, local = F.normalize(torch.randn(2, 5, 4, 8), dim=-1), torch.randn(2, 5, 4, 8)
    count = torch.tensor([27, 11])
    filled = (torch.arange(20) >= 20 - count.clamp(max=20)[:, None])[:, None, :, None]
    state = memorizing.State(F.normalize(torch.randn(2, 2, 20, 8), dim=-1) * filled, torch.randn(2, 2, 20, 8) * filled,
                             count)  # fmt: skip
    with torch.no_grad(), record(lookup) as recording:
        got = lookup(q, local, state, torch.ones(2, 5, dtype=torch.bool))
    keys, values = (t.repeat_interleave(2, 1) for t in (state.keys, state.values))
    score = torch.einsum("bthd,bhsd->bths", q, keys) * 8**0.5
    score = score.masked_fill(~filled[:, :, None, :, 0], -torch.inf)
    order = score.argsort(-1, descending=True)[..., :3]
    weight = torch.zeros_like(score).scatter(-1, order, score.gather(-1, order).softmax(-1))
    gate = torch.tensor(0.5).sigmoid()
    expected = gate * torch.einsum("bths,bhsd->bthd", weight, values) + (1 - gate) * local
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    seen = recording.dataset().isel(layer=0)
    assert seen["retrieval_index"].dims == ("batch", "time", "heads", "picks")
    assert (seen["retrieval_index"].values == (order - 20 + count[:, None, None, None]).numpy()).all()
    assert seen["retrieval_score"].values == pytest.approx(score.gather(-1, order).numpy(), abs=1e-5)
    assert seen["gate"].values == pytest.approx(gate.item())


def test_first_in_first_out(family):
    """What is held are the last pairs, whatever was held before them."""
    model, _ = wrapped(family, layer=0)  # whose keys hang on no memory
    ids = torch.randint(2, 61, (2, 5 * SEGMENT))
    with torch.no_grad():
        state = model(ids).state
        assert state.count.tolist() == [30, 30]
        for last in (12, 18):
            other = model(ids[:, -last:]).state
            for held, alone in zip(state[:2], other[:2], strict=True):
                torch.testing.assert_close(held[:, :, -last:], alone[:, :, -last:], rtol=1e-5, atol=1e-5)
                assert not alone[:, :, :-last].any()
        torch.testing.assert_close(state.keys.norm(dim=-1), torch.ones(state.keys.shape[:3]))
        kept = copy.deepcopy(state)
        model(ids, state=state)
    assert all(a.equal(b) for a, b in zip(state, kept, strict=True))  # a value


def test_what_is_forgotten_is_without_effect():
    """In the last layer, whose pairs hang on no memory."""
    model, _ = wrapped(size=SEGMENT)
    ids = torch.randint(2, 61, (1, 4 * SEGMENT))
    other = ids.clone()
    other[:, :SEGMENT] = torch.randint(2, 61, (1, SEGMENT))
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    assert not torch.allclose(a[:, SEGMENT : 2 * SEGMENT], b[:, SEGMENT : 2 * SEGMENT], **CLOSE)
    torch.testing.assert_close(a[:, 2 * SEGMENT :], b[:, 2 * SEGMENT :], rtol=0, atol=0)


def test_nothing_is_seen_before_its_time(family):
    """Changing a token leaves the logits before it as they are, and changes those behind the segment's end."""
    model, _ = wrapped(family)
    ids = torch.randint(2, 61, (1, 3 * SEGMENT))
    for place in (3, SEGMENT, 2 * SEGMENT - 1):
        other = ids.clone()
        other[:, place] = (ids[:, place] - 1) % 59 + 2
        with torch.no_grad():
            a, b = model(ids).logits, model(other).logits
        torch.testing.assert_close(a[:, :place], b[:, :place], rtol=0, atol=0)
        assert not torch.allclose(a[:, place:], b[:, place:], **CLOSE)
        assert not torch.allclose(a[:, 2 * SEGMENT :], b[:, 2 * SEGMENT :], rtol=1e-6, atol=1e-6)


def test_whole_segments_through_the_state_are_one_call(family):
    """Rows of unequal length, padded on the left, among them; `prefill` leaves the same state."""
    model, _ = wrapped(family)
    ids, lengths = torch.randint(2, 61, (2, 4 * SEGMENT)), (SEGMENT, 2 * SEGMENT, SEGMENT)
    with torch.no_grad():
        whole, state, got = model(ids), None, []
        for part in ids.split(lengths, 1):
            out = model(part, state=state)
            got.append(out.logits)
            state = out.state
        torch.testing.assert_close(torch.cat(got, 1), whole.logits, rtol=1e-5, atol=1e-5)
        resumed = model.prefill(ids[:, SEGMENT:], state=model.prefill(ids[:, :SEGMENT]))
        for other in (state, model.prefill(ids), resumed):
            for a, b in zip(other, whole.state, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_a_row_alone_is_the_row_in_a_batch(family, left):
    """Logits, state and, going on from it, logits again."""
    model, _ = wrapped(family)
    batch, more = prompt(21, 9, 1, left=left), torch.randint(2, 61, (3, 8))
    with torch.no_grad():
        out = model(**batch)
        again = model(more, state=out.state).logits
        for row, length in enumerate((21, 9, 1)):
            tokens = batch["attention_mask"][row].bool()
            alone = model(batch["input_ids"][row : row + 1, tokens])
            torch.testing.assert_close(out.logits[row, tokens], alone.logits[0], **CLOSE)
            assert not out.logits[row, ~tokens].any()
            assert out.state.count[row] == length
            torch.testing.assert_close(out.state.keys[row], alone.state.keys[0], **CLOSE)
            torch.testing.assert_close(again[row], model(more[row : row + 1], state=alone.state).logits[0], **CLOSE)


def test_rows_can_be_chosen():
    model, _ = wrapped()
    ids, rows = torch.randint(2, 61, (2, 3 * SEGMENT)), torch.tensor([1, 1, 0])
    with torch.no_grad():
        state = model.prefill(ids[:, :12])
        got = model(ids[rows, 12:], state=model.reorder(state, rows)).logits
        torch.testing.assert_close(got, model(ids[rows]).logits[:, 12:], **CLOSE)


def test_a_state_can_be_kept(tmp_path):
    model, _ = wrapped()
    state = model.prefill(torch.randint(2, 61, (2, 9)))
    save_state(state, tmp_path / "state.safetensors")
    again = load_state(model.init_state(1), tmp_path / "state.safetensors")
    assert all(a.equal(b) for a, b in zip(again, clone(state), strict=True))
    assert model.state_bytes(state) == 2 * 2 * 2 * 20 * 8 * 4 + 2 * 8  # two rows and heads of keys, two numbers


def test_the_loss_is_that_of_the_logits():
    """Across the ends of segments, padding and labels that do not count left out."""
    model, _ = wrapped()
    batch = prompt(20, 11)
    labels = batch["input_ids"].clone()
    labels[0, 5:9] = -100
    with torch.no_grad():
        logits, out = model(**batch).logits, model(**batch, labels=labels)
    assert out.logits is None
    counts = batch["attention_mask"].bool() & (labels != -100)
    targets = labels.masked_fill(~counts, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.masked_fill(
        ~batch["attention_mask"][:, :-1].bool(), -100).flatten())  # fmt: skip
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradients(family):
    """They reach the gates, the scales and the queries, and nothing that is held: a token of the first segment has none
    from losses of the second; activation checkpointing gives the same."""
    model, _ = wrapped(family, layer=1)
    model.train()
    ids = torch.cat((torch.randint(2, 30, (2, SEGMENT)), torch.randint(30, 61, (2, SEGMENT))), 1)
    labels = ids.clone()
    labels[:, : SEGMENT + 1] = -100
    embedding = model.backbone.get_input_embeddings().weight
    head = model.backbone.get_output_embeddings().weight
    assert (head is embedding) == (family == "opt")

    def gradients():
        model.zero_grad()
        out = model(ids, labels=labels)
        out.loss.backward()
        assert not any(t.requires_grad for t in out.state)
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    for name in ("lookup.gate", "lookup.log_scale"):
        assert plain[name].all()
    if head is not embedding:
        assert not embedding.grad[ids[:, :SEGMENT].unique()].any()
        assert embedding.grad[ids[:, SEGMENT:-1].unique()].any(-1).all()
    model.backbone.activation_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_row_may_hold_nothing_beside_others():
    """It reads what it reads alone, and spoils no gradient."""
    model, _ = wrapped()
    state = model.prefill(**prompt(6, 6))
    state = memorizing.State(state.keys, state.values, state.count * torch.tensor([1, 0]))
    ids = torch.randint(2, 61, (2, SEGMENT))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, state=state).logits[1:], model(ids[1:]).logits, **CLOSE)
    model(ids, labels=ids, state=state).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_the_gates_learn():
    """Alone, from what the model says of a second segment with the gates open."""
    torch.manual_seed(3)
    model, _ = wrapped(picks=1, gate=-3.0, size=SEGMENT, layer=1)
    model.requires_grad_(False)
    model.lookup.requires_grad_(True)
    optimizer = torch.optim.Adam(model.memory_parameters(), 0.1)
    first = torch.randint(2, 61, (8, SEGMENT))
    ids = torch.cat((first, first), 1)
    with torch.no_grad():
        model.lookup.gate.fill_(2.0)
        wanted = model(ids).logits[:, SEGMENT:].softmax(-1)
        model.lookup.gate.fill_(-3.0)
    losses = []
    for _ in range(30):
        logits = model(ids).logits[:, SEGMENT:]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model.lookup.gate > -2.0).all()


def test_saved_alone_and_loaded(family, tmp_path):
    model, backbone = wrapped(family)
    ids = torch.randint(2, 61, (2, 3 * SEGMENT))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["memorizing.safetensors"]
    assert load_file(tmp_path / "memorizing.safetensors").keys() == {"gate", "log_scale"}
    again = MemorizingTransformer.from_pretrained(tmp_path, copy.deepcopy(backbone))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert again.config == model.config
    model.save_pretrained(tmp_path, include_backbone=True)
    loaded = type(backbone).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, backbone(ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"backbone: expected one of the family {family}"):
        MemorizingTransformer.from_pretrained(tmp_path, make("opt" if family != "opt" else "llama"))


def test_the_backbone_goes_on_by_itself(family):
    """Wrapped, it computes and generates what it did; taken out, nothing is left in it."""
    model, backbone = wrapped(family)
    ids = torch.randint(2, 61, (2, 9))
    with torch.no_grad():
        for take in (lambda: model.backbone, model.unwrap):
            own = take()
            torch.testing.assert_close(own(ids).logits, backbone(ids).logits, rtol=0, atol=0)
            expected = backbone.generate(ids, max_new_tokens=4, do_sample=False)
            assert own.generate(ids, max_new_tokens=4, do_sample=False).equal(expected)
    assert [vars(m).keys() for m in own.modules()] == [vars(m).keys() for m in backbone.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())
    MemorizingTransformer(own, SMALL)


def test_what_is_looked_at():
    """Tokens are numbered in their row, on one axis of time through segments and calls; -1 where nothing is found."""
    model, _ = wrapped()
    batch = prompt(14, 4)
    with torch.no_grad(), record(model) as recording:
        state = model(**batch).state
        model(torch.randint(2, 61, (2, 5)), state=state)
    seen = recording.dataset().isel(layer=0)
    index = seen["retrieval_index"]
    assert seen.sizes["time"] == 19 - SEGMENT and int(seen["time"][0]) == SEGMENT
    assert (index.sel(batch=0, time=slice(SEGMENT, 11)).values < SEGMENT).all()
    assert (index.sel(batch=0).values >= 0).all() and int(index.max()) == 13
    assert (index.sel(batch=1, time=slice(SEGMENT, 13)).values == -1).all()  # its four tokens are over
    assert set(index.sel(batch=1, time=slice(14, 18)).values.flatten()) == {0, 1, 2, 3}
    assert seen["gate"].sel(batch=1, time=slice(SEGMENT, 13)).isnull().all()


@pytest.mark.parametrize("fields, message", [
    ({"picks": 0}, "picks: expected at least 1, got 0"),
    ({"size": 0}, "size: expected at least 1, got 0"),
    ({"layer": -1}, "layer: expected 0 or more or None, got -1"),
    ({"layer": 2}, "layer: expected 0 to 1, the backbone's layers, got 2"),
])  # fmt: skip
def test_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MemorizingTransformer(make(), memorizing.Config(**fields))


@pytest.mark.unchecked
@pytest.mark.parametrize("arguments, message", [
    ({"input_ids": torch.ones(2, 3)}, r"input_ids: expected integers \[batch, time\], got torch.float32"),
    ({"attention_mask": torch.ones(2, 9)}, r"attention_mask: expected \[2, 5\], the new tokens only, got \[2, 9\]"),
    ({"labels": torch.ones(2, 4, dtype=torch.int64)}, r"labels: expected \[2, 5\], as input_ids has, got \[2, 4\]"),
    ({"state": 3}, "state: expected 2 rows, as input_ids has, got 3"),
])  # fmt: skip
def test_calls_are_refused(arguments, message):
    model, _ = wrapped()
    if "state" in arguments:
        arguments = {"state": model.init_state(arguments["state"])}
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.ones(2, 5, dtype=torch.int64)} | arguments)


def test_backbones_are_refused():
    with pytest.raises(ValueError, match="backbone: expected one without a hierarchy or another memory"):
        MemorizingTransformer(hf.attach(make(), hf.window(4)))
    model, _ = wrapped()
    with pytest.raises(ValueError, match="backbone: expected one without a hierarchy or another memory"):
        MemorizingTransformer(model.backbone)
    with pytest.raises(ValueError, match="segment_length: expected at most 256, the backbone's positions, got 512"):
        MemorizingTransformer(make("opt"))
    assert MemorizingTransformer(make("llama", num_hidden_layers=12)).layer == 9
