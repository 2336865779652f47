"""Every memory as a causal language model of transformers: its numbers, its state in generation, its trainers."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hmlab import auxiliary, encodings, hf, pretrained
from hmlab.memory import state_bytes
from hmlab.model import Config
from hmlab.registry import UnknownName, from_dict, memory_configs, model_config, to_dict

VOCAB, CONTEXT = 23, 40
HARMONY = {"heads": 2, "window": 6, "segment": 4, "ratios": (1, 2, 4), "budget": 2.0, "capacity": 12, "picks": 3,
           "tables": 2, "bits": 3, "probes": 2, "candidates": 16, "sinks": 2, "query_block": 2, "table": 16,
           "bigram_table": 16}  # fmt: skip
# Small enough that every window, segment and stride is crossed several times.
FIELDS = {"window": {"window": 5, "sinks": 2}, "strided": {"stride": 4}, "linear-attention": {"chunk": 8},
          "transformer-xl": {"segment": 8, "memory": 6}, "gated-linear": {"chunk": 8}, "harmony": HARMONY}  # fmt: skip
CASES = {name: Config(vocab=VOCAB, dim=16, layers=2, memory=config(dim=16, **FIELDS.get(name, {})))
         for name, config in memory_configs().items()}  # fmt: skip
CASES["gpt2-paper"] = model_config("gpt2-paper", dim=16, vocab=VOCAB, layers=2, settings={"context": str(CONTEXT)})
CASES["lstm"] = model_config("lstm", dim=16, vocab=VOCAB, layers=2, settings={"ffn": "tied"})
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 0, "atol": 0}


def make(config):
    """A random model for transformers; weights large enough that its tokens are far from equally likely."""
    model = config.build().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    return hf.as_causal_lm(model)


def prompt(*lengths):
    """Rows of random tokens, padded on the left to the longest."""
    longest = max(lengths)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(0, VOCAB, valid.shape), "attention_mask": valid.long()}


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def lmn():
    return make(CASES["lmn"])


def test_logits_and_loss(case):
    model = make(case)
    ids, labels = prompt(21, 13).values()
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    with torch.no_grad():
        expected, _ = hf.as_language_model(model)(ids)
        out = model(ids, labels=labels)
        torch.testing.assert_close(out.logits, expected, **EXACT)
        loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(out.loss, loss / (labels[:, 1:] != -100).sum())
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(77)).loss, loss / 77)
        # The head's kernel may differ with the number of rows.
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, expected[:, -3:])
        kept = torch.tensor([4, 9])
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected[:, kept])
        assert model(ids, return_dict=False)[0].shape == expected.shape


def test_saves_and_loads(case, tmp_path):
    model = make(case)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is hf.HmlabForCausalLM and not loaded.training
    assert AutoConfig.from_pretrained(tmp_path).model_config() == case == hf.as_language_model(loaded).config
    expected, got = tensors(model), tensors(loaded)  # buffers that are in no file among them
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, **EXACT, msg=name)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = prompt(21)["input_ids"]
    with torch.no_grad():
        expected, _ = hf.as_language_model(model).to(torch.bfloat16)(ids)
        assert half.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(half(ids).logits, expected, **EXACT)


WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "num_return_sequences": 2}}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generates(case, options):
    """With the state as without, in one piece or several, beside others or alone."""
    model, batch = make(case), prompt(17, 5)
    options = {"do_sample": False, "max_new_tokens": 11, "eos_token_id": 3, "pad_token_id": 0} | options

    def generated(batch, **more):
        torch.manual_seed(1)
        return model.generate(**batch, **options, **more).tolist()

    expected = generated(batch, use_cache=False)
    assert generated(batch) == expected
    assert generated(batch, prefill_chunk_size=4) == expected
    if not options["do_sample"]:  # rows share one stream of random numbers
        for row in range(2):
            ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
            alone = generated({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0][ids.shape[1] :]
            assert alone == expected[row][17:][: len(alone)]
            assert set(expected[row][17:][len(alone) :]) <= {0, 3}  # beams fill up with either


def test_generation_steps(case, monkeypatch):
    """The prompt once, then one step a token; beams through each memory's own reorder."""
    model, batch = make(case), prompt(9, 6)
    inside, calls = hf.as_language_model(model), {"hidden": [], "step": [], "reorder": []}

    def spied(of, name):
        plain = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *a, **k: calls[name].append(tuple(a[0].shape)) or plain(*a, **k))

    spied(inside, "hidden")
    spied(inside, "step")
    model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert calls == {"hidden": [(2, 9, 16)], "step": [(2,)] * 5, "reorder": []}
    memory = inside.blocks[1].memory
    plain = memory.reorder
    monkeypatch.setattr(memory, "reorder", lambda state, rows: calls["reorder"].append(len(rows)) or plain(state, rows))
    model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=3)
    assert set(calls["reorder"]) == {6} and len(calls["reorder"]) >= 5


def test_masks_and_positions(case):
    """Padding anywhere, the same as none; packed documents, the same as each alone."""
    model = make(case)
    ids = torch.randint(0, VOCAB, (1, 24))
    holes = torch.rand(1, 24) < 0.7
    with torch.no_grad():
        got = model(ids, holes.long()).logits[holes]
        torch.testing.assert_close(got, model(ids[holes][None]).logits[0], **CLOSE)
        packed = model(ids, position_ids=torch.cat((torch.arange(15), torch.arange(9)))[None]).logits
        alone = torch.cat((model(ids[:, :15]).logits, model(ids[:, 15:]).logits), 1)
        torch.testing.assert_close(packed, alone, **CLOSE)


def test_chunks_and_forks(case):
    """A cache read on by hand, and a copy of it read on otherwise."""
    model = make(case)
    batch, other = prompt(19, 8), torch.randint(0, VOCAB, (2, 2))
    ids, mask = batch.values()
    valid = mask.bool()
    with torch.no_grad():
        expected, cache, got, begin = model(**batch).logits, DynamicCache(), [], 0
        for end in (7, 8, 15):
            out = model(ids[:, begin:end], mask[:, :end], past_key_values=cache)
            assert out.past_key_values is cache and cache.get_seq_length() == end
            got.append(out.logits)
            begin = end
        fork = copy.deepcopy(cache)
        model(other, F.pad(mask[:, :15], (0, 2), value=1), past_key_values=fork)
        for end in (16, 19):
            got.append(model(ids[:, begin:end], mask[:, :end], past_key_values=cache).logits)
            begin = end
        torch.testing.assert_close(torch.cat(got, 1)[valid], expected[valid], **CLOSE)
        again = torch.cat((ids[:, :15], other), 1)
        expected = model(again, F.pad(mask[:, :15], (0, 2), value=1)).logits[:, -1:]
        last = model(again[:, -1:], F.pad(mask[:, :15], (0, 3), value=1), past_key_values=fork).logits
        assert fork.get_seq_length() == 18 and last.shape == expected.shape
        fork.batch_repeat_interleave(2)
        assert len(fork.layers[0].state.position) == 4


def test_a_conversation_goes_on(case):
    """From the cache that generate gives back, as from everything said so far."""
    model, batch = make(case), prompt(9, 4)
    options = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(**batch, **options, return_dict_in_generate=True)
    said = torch.cat((out.sequences, torch.randint(0, VOCAB, (2, 6))), 1)
    mask = F.pad(batch["attention_mask"], (0, 11), value=1)
    expected = model.generate(said, attention_mask=mask, **options)
    assert out.past_key_values.get_seq_length() == 13
    got = model.generate(said, attention_mask=mask, past_key_values=out.past_key_values, **options)
    assert got.tolist() == expected.tolist()


def test_embeddings_in_the_place_of_ids(case):
    model, batch = make(case), prompt(14, 9)
    given = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
             "attention_mask": batch["attention_mask"]}  # fmt: skip
    options = {"max_new_tokens": 6, "do_sample": False}
    if getattr(case.memory, "of_tokens", False):
        with pytest.raises(ValueError, match="tokens: expected ids"):
            model(**given)
        return
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, model(**batch).logits, **EXACT)
    expected = model.generate(**batch, **options)[:, 14:]
    assert model.generate(**given, **options).tolist() == expected.tolist()


def test_trainer(case, tmp_path):
    """Steps over two batches each; what is saved is what was trained."""
    model = make(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCAB, (8, 20))]
    given = TrainingArguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
                              gradient_accumulation_steps=2, report_to="none", use_cpu=True, save_strategy="no",
                              disable_tqdm=True, logging_strategy="no")  # fmt: skip
    trainer = Trainer(model, given, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {"model.embedding.weight", "model.head.weight"} < set(changed)
    ids = torch.stack([row["input_ids"] for row in rows[:2]])
    with torch.no_grad():
        expected = model.eval()(ids, labels=ids)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    trainer.save_model(tmp_path / "model")
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
    torch.testing.assert_close(got, expected.logits, **EXACT)


def test_lora(case, tmp_path):
    """Adapters alone are trained, show in every form of the memories, and come back exactly."""
    model, batch = make(case), prompt(18, 7)
    model.save_pretrained(tmp_path / "base")
    plain = copy.deepcopy(model).requires_grad_(False)  # recurrent networks have another kernel then
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                             LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
    ids = batch["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, **EXACT)
    adapted.train()(ids, labels=ids).loss.backward()
    adapted.eval()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
        expected = adapted(ids).logits
        assert not torch.allclose(expected, plain(ids).logits, atol=0.01)
    options = {"max_new_tokens": 9, "do_sample": False}
    generated = adapted.generate(**batch, **options)
    assert generated.tolist() == adapted.generate(**batch, **options, use_cache=False).tolist()
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, **EXACT)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, **CLOSE)
    assert hf.as_language_model(again.get_base_model()).config == case


def test_gradient_checkpointing(case):
    plain, ids = make(case).train(), prompt(16, 16)["input_ids"]
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing
    with auxiliary.collect() as asked:
        plain(ids)
    if asked:
        with pytest.raises(ValueError, match="gradient_checkpointing: expected False"):
            checkpointed(ids, labels=ids)
        return
    torch.manual_seed(2)
    plain(ids, labels=ids).loss.backward()
    torch.manual_seed(2)
    out = checkpointed(ids, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, weight.grad, **EXACT)
    checkpointed.activation_checkpointing_disable()
    assert not any("forward" in vars(block) for block in hf.as_language_model(checkpointed).blocks)


def test_checkpointing_saves_activations(lmn):
    """Fewer tensors are kept for the backward pass."""
    ids = prompt(32, 32)["input_ids"]

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            lmn.train()(ids, labels=ids)
        return sum(sizes)

    before = kept()
    lmn.activation_checkpointing_enable()
    assert kept() < before / 2


def test_what_memories_ask_for_joins_the_loss():
    """In training, once per target; not in evaluation, nor where somebody collects it."""
    model, ids = make(CASES["harmony"]), prompt(24, 24)["input_ids"]
    start = copy.deepcopy(model).train()

    def loss(**more):
        torch.manual_seed(4)  # the policy draws its choices
        return copy.deepcopy(start)(ids, labels=ids, **more)

    with auxiliary.collect() as asked:
        out = loss()
    assert asked and sum(asked.values()) > 0.01
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain)
    torch.testing.assert_close(loss().loss, plain + sum(asked.values()))
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, labels=ids).loss,
                                   F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))  # fmt: skip
    shared = loss(num_items_in_batch=torch.tensor(92)).loss  # 46 here
    torch.testing.assert_close(shared, (plain + sum(asked.values())) / 2)


def test_new_tokens(lmn, tmp_path):
    ids = prompt(12)["input_ids"]
    with torch.no_grad():
        before = lmn(ids).logits
        lmn.resize_token_embeddings(VOCAB + 3)
        torch.testing.assert_close(lmn(ids).logits[..., :VOCAB], before)
    assert hf.as_language_model(lmn).config.vocab == lmn.config.vocab_size == VOCAB + 3
    lmn.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids + 3).logits, lmn(ids + 3).logits, **EXACT)


def test_only_safetensors(lmn, tmp_path):
    lmn.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lmn.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors: expected True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_weights_that_lack_are_made(lmn, tmp_path):
    """As the constructors make them, not as transformers would."""
    lmn.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    lacking = [name for name in held if "summarizer" in name or name == "model.head.weight"]
    save_file({name: t for name, t in held.items() if name not in lacking}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(lacking)
    torch.manual_seed(3)
    expected = hf.as_causal_lm(CASES["lmn"])
    torch.manual_seed(3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in tensors(again).items():
        torch.testing.assert_close(tensor, tensors(expected if name in lacking else lmn)[name], **EXACT, msg=name)


def test_ways_in_and_out():
    model = CASES["lmn"].build()
    wrapped = hf.as_causal_lm(model)
    assert hf.as_language_model(wrapped) is model and wrapped.training
    assert hf.as_language_model(hf.as_causal_lm(CASES["window"])).config == CASES["window"]
    shipped, name = pretrained.load("logmem-32"), "logmem-32"
    ids = torch.from_numpy(shipped.encoding.encode("To be, or not"))[None].long()
    with torch.no_grad():
        torch.testing.assert_close(hf.as_causal_lm(name)(ids).logits, shipped.model(ids)[0], **EXACT)
    weights = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(dict(hf.as_causal_lm(model).model.state_dict()), dict(weights), **EXACT)
    built = AutoModelForCausalLM.from_config(hf.HmlabConfig.of(CASES["lmn"]))
    # A constructor's own scale, not transformers' 0.02.
    assert built.get_input_embeddings().weight.std() > 0.5
    config = wrapped.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 16, 2)
    assert config.max_position_embeddings is None
    assert hf.HmlabConfig.of(CASES["gpt2-paper"]).max_position_embeddings == CONTEXT


@pytest.mark.unchecked
def test_refusals(lmn, tmp_path):
    ids = prompt(8, 8)["input_ids"]
    with pytest.raises(ValueError, match="input_ids: expected these or inputs_embeds, got neither"):
        lmn()
    with pytest.raises(ValueError, match="input_ids: expected these or inputs_embeds, got both"):
        lmn(ids, inputs_embeds=torch.zeros(2, 8, 16))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[2, 8\]"):
        lmn(ids, torch.ones(2, 9))
    with pytest.raises(ValueError, match="position_ids: expected"):
        lmn(ids, position_ids=torch.arange(8)[None] * 2)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{name}: expected False"):
            lmn(ids, **{name: True})
    with pytest.raises(ValueError, match=r"past_key_values: expected a DynamicCache.* StaticCache"):
        lmn(ids, past_key_values=StaticCache(lmn.config, max_cache_len=8))
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="keys and values"):
        lmn(ids, past_key_values=foreign)
    cache = make(CASES["lmn"])(ids).past_key_values
    with pytest.raises(ValueError, match="another model"):
        lmn(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="model: expected a LanguageModel"):
        hf.as_causal_lm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected a HmlabForCausalLM"):
        hf.as_language_model(nn.Linear(2, 2))
    with pytest.raises(UnknownName, match="no model file"):
        hf.as_causal_lm("logmen-32")
    with pytest.raises(ValueError, match="language_model: expected"):
        hf.HmlabForCausalLM(hf.HmlabConfig())
    with pytest.raises(ValueError, match="tie_word_embeddings: expected False"):
        hf.HmlabForCausalLM(hf.HmlabConfig.of(CASES["lmn"], tie_word_embeddings=True))
    fields = to_dict(CASES["lmn"])
    with pytest.raises(UnknownName, match="wdith"):
        hf.HmlabForCausalLM(hf.HmlabConfig(language_model={**fields, "wdith": 3}))
    assert from_dict(json.loads(json.dumps(fields))) == CASES["lmn"]
    learned = make(CASES["gpt2-paper"])
    with pytest.raises(ValueError, match=f"at most context \\({CONTEXT}\\)"):
        learned.generate(ids, max_new_tokens=CONTEXT, do_sample=False)


def test_the_state_stops_growing():
    model, ids = make(CASES["window"]), prompt(30)["input_ids"]
    with torch.no_grad():
        caches = [model(ids[:, :time]).past_key_values for time in (15, 30)]
    assert state_bytes(caches[0].layers[0].state) == state_bytes(caches[1].layers[0].state)


TEXT = "To be,\r\n or not\tto be: that's  the\u00a0question… é\u0301 日本 😀\x00 <s> [UNK] ' ,a\n\n\n  " * 6


@pytest.mark.parametrize("encoding", [encodings.characters(TEXT), encodings.ByteEncoding(), encodings.bpe(TEXT, 300)],
                         ids=["character", "byte", "bpe"])  # fmt: skip
def test_tokenizers(encoding, tmp_path):
    """The encoding's ids and texts, before and after saving beside a model."""
    made = hf.as_tokenizer(encoding)
    model = hf.as_causal_lm(dataclasses.replace(CASES["lmn"], vocab=encoding.vocab_size))
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == encoding.vocab_size and not tokenizer.all_special_tokens
        for text in (TEXT, TEXT[7:29], " ", "", "<s>"):
            ids = tokenizer(text)["input_ids"]
            assert ids == encoding.encode(text).tolist()
            assert tokenizer.decode(ids) == text
        for ids in torch.randint(0, encoding.vocab_size, (50, 21)).tolist():
            assert tokenizer.decode(ids) == encoding.decode(ids)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(len(tokenizer))
    batch = tokenizer(["To be", "or not to be"], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert batch["attention_mask"][0, 0] == 0
    options = {"max_new_tokens": 5, "do_sample": False}
    alone = model.generate(**tokenizer(["To be"], return_tensors="pt", return_token_type_ids=False), **options)
    assert model.generate(**batch, **options)[0, -5:].tolist() == alone[0, -5:].tolist()


@pytest.mark.unchecked
def test_tokenizers_refuse():
    with pytest.raises(Exception, match="UNK"):
        hf.as_tokenizer(encodings.characters("ab"))("abc")
    with pytest.raises(ValueError, match="surrogate"):
        hf.as_tokenizer(encodings.CharacterEncoding("a\ud800"))
    with pytest.raises(ValueError, match="encoding: expected"):
        hf.as_tokenizer("abc")
