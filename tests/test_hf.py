"""The hierarchy in models of transformers: the same numbers where it must, bounded state, and a way back."""

import copy
import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

from hmlab import hf
from hmlab.auxiliary import collect
from hmlab.hf.attention import rotate
from hmlab.hf.cache import HierarchyLayer
from hmlab.memories import harmony
from hmlab.memories.harmony import HierarchyConfig
from hmlab.memory import state_bytes
from hmlab.record import record

# Equal to attention over the whole past, through windows of 5 to 8 tokens and slots of one token each.
EXACT = HierarchyConfig(window=5, segment=4, sinks=2, ratios=(1,), budget=1.0, retrieval="all", capacity=4096)
# Slots of two to eight tokens, as ids and keys are dense, and at most 16; a query reads four that hashing finds.
SMALL = HierarchyConfig(window=4, segment=8, sinks=1, ratios=(2, 4, 8), budget=4.0, capacity=16, table=16,
                        bigram_table=16, tables=2, bits=4, probes=2, candidates=16, picks=4)  # fmt: skip
# What needs no training.
FREE = dataclasses.replace(SMALL, sinks=0, policy="density", codec="mean_pool", family="hyperplane")
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 256}  # fmt: skip
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": GATED | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "qwen2": GATED | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen3": GATED | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "gpt_neox": {"intermediate_size": 48, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
}  # fmt: skip
ROTARY = [family for family in FAMILIES if family != "opt"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make(family="llama", **fields):
    """A random model; weights large enough that attention is far from uniform."""
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.25)
            elif "norm" in name:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def pair(family="llama", config=EXACT, **fields):
    """A model, and a copy of it with hierarchies."""
    model = make(family, **fields)
    return model, hf.attach(copy.deepcopy(model), config)


def prompt(*lengths, left=True):
    """Rows of random tokens, padded to the longest."""
    longest = max(lengths)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    valid = valid if left else valid.flip(1)
    return {"input_ids": torch.randint(2, 61, valid.shape) * valid, "attention_mask": valid.long()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("left", [True, False])
def test_one_forward_equals_the_model(family, left):
    model, attached = pair(family)
    with torch.no_grad():
        for batch in ({"input_ids": torch.randint(2, 61, (2, 37))}, prompt(23, 9, 1, left=left)):
            expected, got = model(**batch).logits, attached(**batch).logits
            valid = batch.get("attention_mask", torch.ones(2, 37)).bool()
            torch.testing.assert_close(got[valid], expected[valid], **CLOSE)


def test_padding_holds_nothing(family):
    """Whatever ids stand at padding, the tokens' logits are the same."""
    attached = hf.attach(make(family), SMALL)
    batch = prompt(23, 9)
    valid = batch["attention_mask"].bool()
    other = batch | {"input_ids": batch["input_ids"].where(valid, 7)}
    with torch.no_grad():
        torch.testing.assert_close(attached(**batch).logits[valid], attached(**other).logits[valid], rtol=0, atol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_what_the_model_generates(family, beams):
    model, attached = pair(family)
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False}
    for batch in (prompt(11), prompt(12, 5, 1)):
        expected, got = model.generate(**batch, **options), attached.generate(**batch, **options)
        assert got.tolist() == expected.tolist()


def test_generates_the_same_without_a_cache(family):
    attached = hf.attach(make(family), SMALL)
    batch, options = prompt(20, 13), {"max_new_tokens": 6, "do_sample": False}
    expected = attached.generate(**batch, **options, use_cache=False)
    assert attached.generate(**batch, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("config", [SMALL, FREE], ids=["learned", "free"])
def test_chunks_equal_the_whole(family, config):
    """Left padding, a chunk of nothing but padding for a row among them."""
    attached = hf.attach(make(family), config)
    batch = prompt(30, 12)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = attached(**batch).logits
        cache, got, begin = DynamicCache(), [], 0
        for chunk in (7, 1, 13, 1, 8):
            end = begin + chunk
            out = attached(batch["input_ids"][:, begin:end], batch["attention_mask"][:, :end], past_key_values=cache)
            assert out.past_key_values is cache
            got.append(out.logits)
            begin = end
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(torch.cat(got, 1)[valid], expected[valid], **CLOSE)


def test_generate_reads_a_long_prompt_in_chunks():
    model, attached = pair()
    batch, options = prompt(29, 17), {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **options)
    assert attached.generate(**batch, **options, prefill_chunk_size=6).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ROTARY)
def test_packed_documents_do_not_leak(family):
    _, attached = pair(family)
    first, second = torch.randint(2, 61, (1, 13)), torch.randint(2, 61, (1, 10))
    position = torch.cat((torch.arange(13), torch.arange(10)))[None]
    with torch.no_grad():
        packed = attached(torch.cat((first, second), 1), position_ids=position, use_cache=False).logits
        alone = torch.cat((attached(first).logits, attached(second).logits), 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


def test_the_cache_stops_growing(family):
    attached = hf.attach(make(family), SMALL)
    sizes, cache = [], DynamicCache()
    with torch.no_grad():
        for _ in range(12):
            attached(torch.randint(2, 61, (2, 16)), past_key_values=cache)
            sizes.append(state_bytes([layer.state for layer in cache.layers]))
    assert len(set(sizes[-6:])) == 1
    kv_heads = getattr(attached.config, "num_key_value_heads", 4)
    whole = 2 * 2 * 192 * kv_heads * hf.hierarchies(attached)[0].head_dim * 4 * 2  # k and v, rows, layers
    assert sizes[-1] < whole / 2


def test_cache_rows_can_be_chosen():
    attached = hf.attach(make(), SMALL)
    ids = torch.randint(2, 61, (2, 30))
    rows = torch.tensor([1, 1, 0])
    with torch.no_grad():
        expected = attached(ids[rows]).logits[:, 20:]
        for choose in (
            lambda cache: cache.reorder_cache(rows),
            lambda cache: cache.batch_select_indices(rows),
            lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([2, 3, 0]))),
        ):
            cache = attached(ids[:, :20]).past_key_values
            choose(cache)
            got = attached(ids[rows][:, 20:], past_key_values=cache).logits
            torch.testing.assert_close(got, expected, **CLOSE)
        cache.reset()
        torch.testing.assert_close(attached(ids, past_key_values=cache).logits[rows][:, 20:], expected, **CLOSE)


def test_gradients_are_those_of_the_model(family):
    """Exact reading gives the model's own weights the gradients that attention gives them, checkpointed or not."""
    model, attached = pair(family)
    model.train(), attached.train()
    batch = prompt(21, 13)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradients(of):
        of.zero_grad()
        of(**batch, labels=labels).loss.backward()
        return {name: weight.grad for name, weight in of.named_parameters() if weight.grad is not None}

    expected, got = gradients(model), gradients(attached)
    attached.activation_checkpointing_enable()
    checkpointed = gradients(attached)
    assert len(expected) == len(list(model.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **CLOSE)
        torch.testing.assert_close(checkpointed[name], got[name], rtol=1e-5, atol=1e-5)


def test_the_hierarchies_alone_can_be_trained(family):
    """By the model's loss and their own, all of their parameters and no others."""
    attached = hf.attach(make(family), SMALL).requires_grad_(False).train()
    new = hf.hierarchies(attached).requires_grad_(True)
    with torch.no_grad():
        for weight in new.parameters():  # a policy that begins at zero teaches its first layer nothing
            weight.add_(torch.randn_like(weight), alpha=0.1)
    ids = torch.randint(2, 61, (2, 60))
    with collect() as losses:
        loss = attached(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    by_the_model = {name for name, weight in new.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {name.partition(".")[0] for name in by_the_model} == {"0", "1"}
    sum(losses.values()).backward()
    assert all(weight.grad.any() for weight in new.parameters())
    assert all(weight.grad is None for name, weight in attached.named_parameters() if ".hierarchy." not in name)


def test_token_ids_reach_the_hierarchies():
    attached = hf.attach(make(), SMALL)
    embeddings = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        attached(inputs_embeds=embeddings)
    hf.attach(hf.detach(attached), EXACT)(inputs_embeds=embeddings)  # nothing counts them here


def test_saved_and_loaded(family, tmp_path):
    """A trained model and its hierarchies, each by its own means, from one folder."""
    attached = hf.attach(make(family), SMALL)
    with torch.no_grad():
        for weight in attached.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    attached.save_pretrained(tmp_path)
    hf.save(attached, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert hf.load(again, tmp_path) is again
    assert hf.hierarchies(again)[0].config == SMALL
    ids = torch.randint(2, 61, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, attached(ids).logits, rtol=0, atol=0)


def test_loading_refuses_what_does_not_fit(tmp_path):
    hf.save(hf.attach(make("llama"), SMALL), tmp_path)
    with pytest.raises(ValueError, match="model: expected one of the family llama, got opt"):
        hf.load(make("opt"), tmp_path)
    deeper = make("llama", num_hidden_layers=3)
    keys = list(deeper.state_dict())
    with pytest.raises(ValueError, match=r"model: expected one that the hierarchies .* fit"):
        hf.load(deeper, tmp_path)
    assert list(deeper.state_dict()) == keys
    (tmp_path / "hierarchy.safetensors").write_bytes((tmp_path / "hierarchy.safetensors").read_bytes().replace(
        b"hmlab-hierarchy-2", b"hmlab-hierarchy-9"))  # fmt: skip
    with pytest.raises(ValueError, match="folder: expected hierarchies in the format hmlab-hierarchy-2"):
        hf.load(make("llama"), tmp_path)


def test_detached_is_the_model(family):
    model, attached = pair(family, SMALL)
    ids = torch.randint(2, 61, (2, 30))
    with torch.no_grad():
        assert not torch.allclose(attached(ids).logits, model(ids).logits, **CLOSE)
        for detached in (hf.detach(copy.deepcopy(attached)), hf.detach(attached)):
            torch.testing.assert_close(detached(ids).logits, model(ids).logits, rtol=0, atol=0)
            assert [*detached.state_dict()] == [*model.state_dict()]
            assert vars(detached.base_model).keys() == vars(model.base_model).keys()
            assert detached.config.to_dict() == model.config.to_dict()
            assert detached.config._attn_implementation == model.config._attn_implementation
            hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in detached.modules()]
            assert not any(len(found) for both in hooks for found in both)
            hf.attach(detached, SMALL)


def test_rotation_far_out():
    """At positions near a million, against rotation by complex numbers in float64."""
    model = make("gpt_neox")
    rotary = model.base_model.rotary_emb
    x, position = torch.randn(1, 5, 2, 8), torch.tensor([0.0, 0.25, 17.5, 999_999.5, 2e6])[None, :, None].double()
    frequency = rotary.inv_freq.double()
    turned = torch.complex(x[..., :2].double(), x[..., 2:4].double()) * torch.exp(1j * position[..., None] * frequency)
    expected = torch.cat((turned.real, turned.imag, x[..., 4:].double()), -1)
    torch.testing.assert_close(rotate(rotary, x, position).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ROTARY)
def test_rotation_is_the_models(family):
    """What attention multiplies, from the unrotated tensors that a hierarchy gets."""
    rotary = make(family).base_model.rotary_emb
    x, position = torch.randn(2, 19, 3, 16 if family == "qwen3" else 8), torch.arange(19).expand(2, -1)
    module = __import__(type(rotary).__module__, fromlist=["apply_rotary_pos_emb"])
    cos, sin = rotary(x, position)
    expected, _ = module.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(rotary, x, position[..., None].double()), expected, rtol=1e-5, atol=1e-5)


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="config: expected a HierarchyConfig, got Config"):
        hf.attach(make(), harmony.Config(dim=32))


def test_families_are_refused_by_name():
    config = transformers.AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="expected one of the families llama, qwen2, qwen3, gpt_neox, opt, got gpt2"):
        hf.attach(model, SMALL)


def test_models_that_attend_otherwise_are_refused():
    with pytest.raises(ValueError, match=r"config.layer_types: .* got sliding_attention"):
        hf.attach(make("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), SMALL)
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"config.rope_parameters: .* got dynamic"):
        hf.attach(make("llama", rope_parameters=rope), SMALL)


def test_attached_and_detached_once():
    attached = hf.attach(make(), SMALL)
    with pytest.raises(ValueError, match="model: expected one without a hierarchy"):
        hf.attach(attached, SMALL)
    hf.detach(attached)
    for call in (hf.detach, hf.hierarchies):
        with pytest.raises(ValueError, match="model: expected one with a hierarchy"):
            call(attached)


@pytest.mark.parametrize("arguments, message", [
    ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask: expected \[2, 9\].* got \[2, 1, 9, 9\]"),
    ({"attention_mask": {"full_attention": None}}, r"attention_mask: expected \[2, 9\].* got dict"),
    ({"attention_mask": torch.ones(2, 12)}, r"attention_mask: expected \[2, 9\].* got \[2, 12\]"),
    ({"attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] + [1] * 4])}, "attention_mask: expected padding before"),
    ({"position_ids": torch.arange(0, 18, 2)[None]}, "position_ids: expected each one behind the last"),
    ({"past_key_values": "static"}, "past_key_values: expected a DynamicCache, .* got StaticCache"),
    ({"past_key_values": "filled"}, "past_key_values: expected a DynamicCache, .* got one with keys and values"),
    ({"output_attentions": True}, "output_attentions: expected False"),
    ({"is_causal": False}, "is_causal: expected True"),
])  # fmt: skip
def test_what_cannot_be_served_is_refused(arguments, message):
    model, attached = pair(config=SMALL)
    ids = torch.randint(2, 61, (2, 9))
    caches = {"static": lambda: StaticCache(config=model.config, max_cache_len=32),
              "filled": lambda: model(ids).past_key_values}  # fmt: skip
    if "past_key_values" in arguments:
        arguments = {"past_key_values": caches[arguments["past_key_values"]]()}
    with pytest.raises(ValueError, match=message):
        attached(ids, **arguments)


def test_attention_dropout_is_refused_in_training():
    attached = hf.attach(make(attention_dropout=0.1), SMALL)
    ids = torch.randint(2, 61, (1, 5))
    attached(ids)
    with pytest.raises(ValueError, match="attention_dropout: expected 0"):
        attached.train()(ids)


def test_a_cache_is_of_no_use_without_its_hierarchies():
    attached = hf.attach(make(), SMALL)
    ids = torch.randint(2, 61, (1, 9))
    with torch.no_grad():
        cache = attached(ids).past_key_values
        with pytest.raises(ValueError, match="tokens_to_remove: expected 0"):
            cache.crop(-1)
        hf.detach(attached)
        assert all(isinstance(layer, HierarchyLayer) for layer in cache.layers)
        with pytest.raises(ValueError, match="past_key_values: this cache was filled by a hierarchy"):
            attached(ids[:, :1], past_key_values=cache)


def test_saved_alone_is_small(tmp_path):
    """Only what came with the hierarchies is in the file."""
    attached = hf.attach(make(), SMALL)
    hf.save(attached, tmp_path)
    held = load_file(tmp_path / "hierarchy.safetensors")
    new = {name for name in attached.state_dict() if ".hierarchy." in name}
    assert len(held) == len(new) == len(hf.hierarchies(attached).state_dict())


def test_an_attached_model_can_be_looked_into():
    _, attached = pair(config=SMALL)
    with torch.no_grad(), record(attached) as recording:
        attached(**prompt(60, 40))
    seen = recording.dataset()
    assert seen.sizes["layer"] == 2 and seen.sizes["time"] == 60
    assert set(seen["memory"].values) == {"Attached"}
    share = seen["hit_share"].isel(batch=0)
    assert share.sum("tiers").values == pytest.approx(1, abs=1e-5)
    assert (seen["retrieval_index"].isel(batch=0).values >= 0).any()
