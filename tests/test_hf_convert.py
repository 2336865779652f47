"""Some layers of a model of transformers replaced: the rest to the bit, one cache, what is copied, before and after."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from test_hf import CLOSE, EXACT, FAMILIES, FREE, SMALL, make, prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hmlab import hf
from hmlab.hf.cache import HierarchyLayer
from hmlab.hf.conversion import WHEN
from hmlab.memories import lmn
from hmlab.memory import state_bytes
from hmlab.record import record

LMN = lmn.Config(dim=32, heads=4, banks=2)
# One layer of each kind; the second keeps its attention.
MIXED = {0: SMALL, 2: LMN, 3: hf.window(5)}
DEEP = {"num_hidden_layers": 4}


def mixed(family="llama", layers=None):
    """A model, and a copy of it with some layers replaced."""
    model = make(family, **DEEP)
    torch.manual_seed(1)
    return model, hf.attach(copy.deepcopy(model), MIXED if layers is None else layers)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_layers_that_stay_are_the_models_to_the_bit(family):
    """What comes before the first replaced layer; and what a layer behind it makes of the same input."""
    model, attached = mixed(family, {1: hf.window(3)})
    kept = (0, 2, 3)

    def outputs(of, batch, given=None):
        """What each attention that stays puts out; given: what goes into it instead."""
        seen, hooks = {}, []
        for number in kept:
            module = hf.attachment.attentions(of)[number]

            def before(module, args, kwargs, number=number):
                args, kwargs = (given or {}).get(number, (args, kwargs))
                seen[number] = [args, {name: value for name, value in kwargs.items() if name != "harmony"}]
                return args, kwargs

            def after(module, args, output, number=number):
                seen[number].append(output[0])

            def called(module, args, kwargs):
                assert "harmony" not in kwargs

            hooks += [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
                      module.register_forward_pre_hook(called, with_kwargs=True),
                      module.register_forward_hook(after)]  # fmt: skip
        of(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    with torch.no_grad():
        for batch in ({"input_ids": torch.randint(2, 61, (2, 17))}, prompt(17, 9)):
            got = outputs(attached, batch)
            expected = outputs(model, batch, {number: seen[:2] for number, seen in got.items()})
            for number in kept:
                torch.testing.assert_close(got[number][2], expected[number][2], rtol=0, atol=0)
            first = model(**batch, output_hidden_states=True).hidden_states[1]
            assert attached(**batch, output_hidden_states=True).hidden_states[1].equal(first)


@pytest.mark.parametrize("layers", [{1: EXACT}, {0: EXACT, 3: EXACT}], ids=["one", "two"])
def test_exact_reading_in_some_layers_is_the_model(family, layers):
    """Logits, and what is generated with rows of unequal length, with beams and in chunks."""
    model, attached = mixed(family, layers)
    batch = prompt(13, 6, 1)
    valid, options = batch["attention_mask"].bool(), {"max_new_tokens": 7, "do_sample": False}
    with torch.no_grad():
        torch.testing.assert_close(attached(**batch).logits[valid], model(**batch).logits[valid], **CLOSE)
    for beams in (1, 3):
        expected = model.generate(**batch, **options, num_beams=beams).tolist()
        assert attached.generate(**batch, **options, num_beams=beams).tolist() == expected
        assert attached.generate(**batch, **options, num_beams=beams, prefill_chunk_size=5).tolist() == expected


def test_generates_the_same_without_a_cache(family):
    _, attached = mixed(family)
    batch, options = prompt(20, 13), {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        expected = attached.generate(**batch, **options, num_beams=beams, use_cache=False)
        assert attached.generate(**batch, **options, num_beams=beams).tolist() == expected.tolist()
    assert attached.generate(**batch, **options, prefill_chunk_size=6).tolist() == attached.generate(
        **batch, **options).tolist()  # fmt: skip


def test_chunks_equal_the_whole_and_rows_do_not_meet(family):
    """Left padding, a chunk of nothing but padding for a row and single tokens among them; a row alone is the same."""
    _, attached = mixed(family)
    batch = prompt(30, 12)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = attached(**batch).logits
        alone = attached(batch["input_ids"][1:, 18:]).logits
        cache, got, begin = DynamicCache(), [], 0
        for chunk in (7, 1, 13, 1, 7, 1):
            end = begin + chunk
            out = attached(batch["input_ids"][:, begin:end], batch["attention_mask"][:, :end], past_key_values=cache)
            got.append(out.logits)
            begin = end
    assert [type(layer) for layer in cache.layers] == [HierarchyLayer, DynamicLayer, HierarchyLayer, HierarchyLayer]
    torch.testing.assert_close(torch.cat(got, 1)[valid], expected[valid], **CLOSE)
    torch.testing.assert_close(alone[0], expected[1, 18:], **CLOSE)


def test_padding_holds_nothing(family):
    _, attached = mixed(family)
    batch = prompt(23, 9)
    valid = batch["attention_mask"].bool()
    other = batch | {"input_ids": batch["input_ids"].where(valid, 7)}
    with torch.no_grad():
        torch.testing.assert_close(attached(**batch).logits[valid], attached(**other).logits[valid], rtol=0, atol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packed_documents_do_not_leak(family):
    """Layers that stay tell them apart as transformers does, without a cache and a mask; the others always."""
    _, attached = mixed(family)
    first, second = torch.randint(2, 61, (1, 13)), torch.randint(2, 61, (1, 10))
    position = torch.cat((torch.arange(13), torch.arange(10)))[None]
    with torch.no_grad():
        packed = attached(torch.cat((first, second), 1), position_ids=position, use_cache=False).logits
        alone = torch.cat((attached(first).logits, attached(second).logits), 1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_window_is_attention_to_the_last_tokens(family, tokens):
    """Against the model with a mask of pairs of its own."""
    model, attached = mixed(family, hf.window(tokens))
    ids = torch.randint(2, 61, (2, 23))
    distance = torch.arange(23)[:, None] - torch.arange(23)
    band = ((distance >= 0) & (distance < tokens)).expand(2, 1, -1, -1)
    position = {"position_ids": torch.arange(23)[None]}
    with torch.no_grad():
        expected = model(ids, attention_mask=band, **position, use_cache=False).logits
        torch.testing.assert_close(attached(ids).logits, expected, **CLOSE)
    assert not list(hf.hierarchies(attached).parameters())


def test_an_lmn_begins_with_the_weights_of_attention(family):
    """A first token sees itself alone, and reads what it read; the second sees itself and a pair's mean."""
    fields = {"head_dim": 8} if family == "qwen3" else {}  # so that the channels add up
    model = make(family, num_hidden_layers=1, **fields)
    attached = hf.attach(copy.deepcopy(model), {0: LMN})
    attention = hf.attachment.attentions(model)[0]
    memory, x = hf.hierarchies(attached)[0], torch.randn(1, 2, 32)
    with torch.no_grad():
        memory.summarizer.weight.copy_(torch.eye(32).repeat(2, 1).expand(2, -1, -1) / 2)
        memory.summarizer.bias.zero_()
        ids = torch.randint(2, 61, (3, 1))
        torch.testing.assert_close(attached(ids).logits, model(ids).logits, **CLOSE)

        if family == "gpt_neox":
            q, k, v = attention.query_key_value(x).unflatten(-1, (4, 24)).split(8, -1)
        else:
            q, k, v = (getattr(attention, name)(x).unflatten(-1, (-1, 8)) for name in ("q_proj", "k_proj", "v_proj"))
        k, v = (t.repeat_interleave(4 // t.shape[2], 2) for t in (k, v))
        # The newest token's query; keys and values of it and, in two banks, of the mean. Projections are affine.
        keys, values = (torch.stack((t[0, 1], t[0].mean(0), t[0].mean(0))) for t in (k, v))
        weight = (torch.einsum("hd,nhd->hn", q[0, 1], keys) / 8**0.5).softmax(-1)
        read = torch.einsum("hn,nhd->hd", weight, values).flatten()
        output = getattr(attention, {"gpt_neox": "dense", "opt": "out_proj"}.get(family, "o_proj"))
        torch.testing.assert_close(memory(x)[0][0, 1], output(read), rtol=1e-5, atol=1e-5)


def test_a_summary_begins_near_the_mean_of_its_parts():
    for arity in (2, 3):
        _, attached = mixed(layers={1: lmn.Config(dim=32, heads=4, banks=2, arity=arity)})
        memory = hf.hierarchies(attached)[0]
        children = torch.randn(1, 64, arity, 32)
        with torch.no_grad():
            node, mean = memory.summarizer(children), children.mean(2)
        # The usual start: weights of deviation 0.1 · sqrt(2 / (dim · (kernel · dim + banks))), a bias of the same kind.
        noise = 0.1 * (arity * 32 * 2 / (32 * (arity * 32 + 2)) + 2 / (2 * 32 + 32)) ** 0.5
        assert 0.2 * noise < (node - mean).std() < 2 * noise
        assert not torch.allclose(node[0], node[1], atol=noise / 10)  # else both banks would learn the same


def test_what_cannot_be_copied_is_new():
    """Qwen3 whose heads are wider than its width has room for: an LMN stands there, and nothing of it is copied."""
    model = make("qwen3", **DEEP)
    attached = hf.attach(model, {1: LMN})
    batch, options = prompt(9, 4), {"max_new_tokens": 4, "do_sample": False}
    expected = attached.generate(**batch, **options, use_cache=False)
    assert attached.generate(**batch, **options).tolist() == expected.tolist()


def test_gradients_reach_the_new_layers(family):
    """With activation checkpointing as without."""
    _, attached = mixed(family)
    attached.train()
    ids = torch.randint(2, 61, (2, 30))

    def gradients():
        attached.zero_grad()
        attached(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in attached.named_parameters() if p.grad is not None and p.grad.any()}

    plain = gradients()
    attached.activation_checkpointing_enable()
    checkpointed = gradients()
    assert {name for name, _ in hf.hierarchies(attached)[1].named_parameters()} <= {
        name.partition(".hierarchy.")[2] for name in plain}  # fmt: skip
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-5)


def test_detached_is_the_model(family):
    model, attached = mixed(family)
    ids = torch.randint(2, 61, (2, 20))
    with torch.no_grad():
        assert not torch.allclose(attached(ids).logits, model(ids).logits, **CLOSE)
        for detached in (hf.detach(copy.deepcopy(attached)), hf.detach(attached)):
            torch.testing.assert_close(detached(ids).logits, model(ids).logits, rtol=0, atol=0)
            assert [*detached.state_dict()] == [*model.state_dict()]
            assert [vars(m).keys() for m in detached.modules()] == [vars(m).keys() for m in model.modules()]
            assert all(m.config is detached.config for m in hf.attachment.attentions(detached))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in detached.modules())


def test_saved_in_two_files_and_loaded_in_two_lines(family, tmp_path):
    """The model's own weights and no others in its file, the others in ours."""
    _, attached = mixed(family)
    with torch.no_grad():
        for weight in attached.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    hf.save(attached, tmp_path, include_model=True)
    assert not any(".hierarchy." in name for name in load_file(tmp_path / "model.safetensors"))
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hf.load(again, tmp_path)
    assert again.base_model.training is False
    ids = torch.randint(2, 61, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, attached(ids).logits, rtol=0, atol=0)


def test_the_trainer_resumes_with_the_new_layers(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 61, (6, 20))]

    def trained(**resume):
        _, attached = mixed(layers={0: LMN, 2: FREE})
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            logging_strategy="no", disable_tqdm=True)  # fmt: skip
        transformers.Trainer(attached, arguments, train_dataset=rows).train(**resume)
        return attached

    whole, resumed = trained(), trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not hf.hierarchies(whole)[0].qkv.weight.equal(hf.hierarchies(mixed(layers={0: LMN})[1])[0].qkv.weight)
    for expected, got in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_each_kind_can_be_looked_into():
    _, attached = mixed()
    with torch.no_grad(), record(attached) as recording:
        attached(torch.randint(2, 61, (1, 40)))
    seen = recording.dataset()
    assert list(seen["memory"].values) == ["Attached", "LogarithmicMemory", "Attached"]
    assert seen["attention"].isel(layer=1).sum("node").values == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("layers, message", [
    ({}, r"config: expected layers among 0 to 3, got \[\]"),
    ({4: SMALL}, r"config: expected layers among 0 to 3, got \[4\]"),
    ({-1: SMALL}, r"config: expected layers among 0 to 3, got \[-1\]"),
    ({1: lmn.Config(dim=16)}, "dim: expected 32, the model's hidden size, got 16"),
    ({1: lmn.Config(dim=32, heads=2)}, "heads: expected 4, as the model has .* got 2"),
])  # fmt: skip
def test_layers_that_cannot_be_are_refused(layers, message):
    model = make(**DEEP)
    with pytest.raises(ValueError, match=message):
        hf.attach(model, layers)
    hf.attach(model, MIXED)  # nothing was changed


def test_caches_of_other_layers_are_refused():
    model, attached = mixed()
    ids = torch.randint(2, 61, (1, 9))
    with torch.no_grad():
        cache = attached(ids).past_key_values
        other = hf.attach(copy.deepcopy(model), {1: SMALL})
        with pytest.raises(ValueError, match=r"past_key_values: .* got one with hierarchies in other layers"):
            other(ids, past_key_values=cache)
        cache.layers[1].crop(-2)
        with pytest.raises(ValueError, match=r"past_key_values: .* got one whose layers have read unlike numbers"):
            attached(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: this cache was filled by a hierarchy"):
            model(ids, past_key_values=attached(ids).past_key_values)


def test_dropout_of_attention_is_refused_in_training():
    attached = hf.attach(make(attention_dropout=0.1), {1: LMN})
    ids = torch.randint(2, 61, (1, 5))
    attached(ids)
    with pytest.raises(ValueError, match="attention_dropout: expected 0"):
        attached.train()(ids)


def repeats(rows, period=12, copies=3, seed=0):
    """Rows of random tokens that begin again: what comes next stands `period` tokens before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 26, (rows, period), generator=generator).repeat(1, copies)


@pytest.fixture(scope="module")
def trained():
    """A small model that has learned to look twelve tokens back."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=26, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(300):
        ids = repeats(32, seed=100 + step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


HELD_OUT = [repeats(16, seed=1), repeats(8, seed=2)]
BATCHES = [repeats(16, seed=1000 + n) for n in range(50)]


def test_conversion_compares_before_and_after(trained):
    """Windows too narrow for the repetition lose what is far and nothing of what is near; two of them in a row reach
    far enough to learn some of it again."""
    model, steps = copy.deepcopy(trained), []
    narrow = {0: hf.window(8), 1: hf.window(8)}
    done = hf.convert(model, narrow, batches=BATCHES, held_out=HELD_OUT, steps=100, learning_rate=2e-3, train="all",
                      near=8, length=100, progress=lambda step, loss: steps.append((step, loss)))  # fmt: skip
    assert done.model is model and not model.training
    loss = done.dataset["loss"]
    assert loss.dims == ("when", "place") and list(loss["when"].values) == list(WHEN)
    assert float(loss.sel(when="attached", place="near")) == pytest.approx(
        float(loss.sel(when="before", place="near")), abs=1e-4)  # fmt: skip
    assert float(loss.sel(when="before", place="far")) < 1.5
    assert float(loss.sel(when="attached", place="far")) > float(loss.sel(when="before", place="far")) + 1
    assert float(loss.sel(when="trained", place="far")) < float(loss.sel(when="attached", place="far")) - 1
    assert [step for step, _ in steps] == list(range(1, 101))
    assert done.dataset["training_loss"].values == pytest.approx([loss for _, loss in steps])
    # Against the losses that the models give themselves.
    with torch.no_grad():
        for when, of in (("before", trained), ("trained", model)):
            both = [F.cross_entropy(of(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none") for ids in HELD_OUT]
            expected = torch.cat(both).mean(0)
            assert done.dataset["position_loss"].sel(when=when).values == pytest.approx(expected.numpy(), abs=1e-5)
            assert float(loss.sel(when=when, place="far")) == pytest.approx(float(expected[8:].mean()), abs=1e-5)
    held = done.dataset["state_bytes"]
    k_and_v, heads, channels, size = 2, 2, 8, 4
    assert held.sel(when="before").values.tolist() == [100 * k_and_v * heads * channels * size] * 2
    with torch.no_grad():
        cache = model(repeats(1, copies=9)[:, :100]).past_key_values
    assert held.sel(when="trained").values.tolist() == [state_bytes(layer.state) for layer in cache.layers]
    assert (held.sel(when="trained") < held.sel(when="before") / 4).all()


def test_conversion_trains_the_new_alone(trained):
    model = copy.deepcopy(trained)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = hf.convert(model, {1: LMN}, batches=BATCHES, held_out=HELD_OUT, steps=40, learning_rate=5e-3, near=12)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        assert ".hierarchy." in name or parameter.equal(before[name])
    loss = done.dataset["loss"].sel(place="all")
    assert float(loss.sel(when="trained")) < float(loss.sel(when="attached")) - 0.2
    counts = done.dataset.sel(layer=1)
    added = sum(p.numel() for p in hf.hierarchies(model).parameters())
    assert list(done.dataset["kind"].values) == ["attention", "lmn"]
    assert int(counts["parameters_added"]) == added
    assert int(counts["parameters_copied"]) == 4 * 32 * 32 + 4 * 32
    assert int(counts["parameters_idle"]) == 32 * 32 * 3
    assert done.dataset["parameters_added"].values[0] == 0


def test_conversion_is_the_same_again_and_leaves_the_generators(trained):
    def run():
        done = hf.convert(copy.deepcopy(trained), {1: SMALL}, batches=BATCHES, held_out=HELD_OUT, steps=3, seed=5)
        return done.dataset

    torch.manual_seed(7)
    first, drawn = run(), torch.rand(3)
    torch.manual_seed(7)
    assert drawn.equal(torch.rand(3))
    assert run().equals(first)


def test_an_interrupted_conversion_is_of_use(trained):
    model = copy.deepcopy(trained)

    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    done = hf.convert(model, {1: LMN}, batches=BATCHES, held_out=HELD_OUT, steps=40, progress=stop)
    assert done.dataset.attrs["interrupted"] == 1 and done.dataset.attrs["steps"] == 4
    assert done.dataset["loss"].notnull().all()
    assert all(p.requires_grad for p in model.parameters())
    assert model.generate(repeats(2), max_new_tokens=3).shape == (2, 39)
    hf.detach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(HELD_OUT[0]).logits, trained(HELD_OUT[0]).logits, rtol=0, atol=0)


@pytest.mark.parametrize("arguments, message", [
    ({"held_out": []}, r"held_out: expected texts of one length, .* got lengths \[\]"),
    ({"held_out": [repeats(1), repeats(1)[:, :9]]}, r"held_out: .* got lengths \[9, 36\]"),
    ({"near": 35}, "near: expected 1 to 34, held-out texts have 36 tokens, got 35"),
    ({"steps": -1}, "steps: expected at least 0, got -1"),
    ({"length": 0}, "length: expected at least 1, got 0"),
    ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
    ({"layers": {7: SMALL}}, "config: expected layers among 0 to 1"),
    ({"layers": {1: hf.window(8)}}, "train: expected all, the new layers have no parameters"),
    ({"batches": iter(())}, "batches: expected batches for every step"),
])  # fmt: skip
def test_conversions_that_cannot_be_are_refused(trained, arguments, message):
    model = copy.deepcopy(trained)
    given = {"layers": {1: LMN}, "batches": BATCHES, "held_out": HELD_OUT, "steps": 2} | arguments
    with pytest.raises(ValueError, match=message):
        hf.convert(model, given.pop("layers"), **given)
    if "batches" not in arguments:
        hf.attach(model, SMALL)  # nothing was changed
