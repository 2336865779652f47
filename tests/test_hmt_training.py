"""HMT's training in stages, its checkpoints and the authors', perplexities, and a book read with interruptions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hmt_models import SMALL, VOCAB, backbone, text, wrapped
from safetensors.torch import load_file, save_file

from hmlab import auxiliary
from hmlab import train as training
from hmlab.bench_hmt import AuthorsLoop
from hmlab.memory import state_bytes
from hmlab.tasks import Batch
from hmlab.wrappers.hmt import HMT, added_parameters
from hmlab.wrappers.hmt import reading as book
from hmlab.wrappers.hmt import training as stages_of
from hmlab.wrappers.hmt.evaluation import losses, perplexities
from hmlab.wrappers.hmt.loss import CHUNK, cross_entropy
from hmlab.wrappers.hmt.training import Stage, train, two_stages

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = {"train": text(3000, seed=1), "valid": text(600, seed=2)}


def lora(model, adapter="default", **fields):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields)
    adapted = peft.get_peft_model(model, config, adapter_name=adapter)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return adapted.eval()


@pytest.mark.parametrize("family", ["llama", "opt", "lmn", "mamba"])
@torch.no_grad()
def test_the_wrapper_alone_is_saved(family, tmp_path):
    hmt, ids = wrapped(family), text(2, 40)
    hmt.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hmt.safetensors"]
    assert sum(v.numel() for v in load_file(tmp_path / "hmt.safetensors").values()) == sum(
        p.numel() for p in hmt.memory_parameters()
    )
    loaded = HMT.from_pretrained(tmp_path, backbone(family))
    assert loaded.config == hmt.config
    assert torch.equal(loaded(ids).logits, hmt(ids).logits)


@pytest.mark.parametrize("family", ["llama", "lmn"])
@torch.no_grad()
def test_the_backbone_goes_along_if_wanted(family, tmp_path):
    hmt, ids = wrapped(family), text(2, 40)
    hmt.save_pretrained(tmp_path, include_backbone=True)
    assert not list(tmp_path.rglob("*.bin"))
    assert torch.equal(HMT.from_pretrained(tmp_path)(ids).logits, hmt(ids).logits)


def test_adapters_are_the_wrappers_too(tmp_path):
    """LoRA inside the backbone: trained alone, saved and loaded exactly; on the embedding as well."""
    hmt, ids = HMT(lora(backbone("llama"), modules_to_save=None), HMT.Config(**SMALL)).train(), text(2, 40)
    hmt(ids, labels=ids).loss.backward()
    learned = {name for name, p in hmt.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"summary", "memory", "recall.query.weight"} <= learned
    assert all("lora" in name or "backbone" not in name for name in learned) and any("lora_A" in n for n in learned)
    hmt.eval().save_pretrained(tmp_path)
    loaded = HMT.from_pretrained(tmp_path, backbone("llama"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, hmt(ids).logits)
        assert not torch.equal(HMT(backbone("llama"), HMT.Config(**SMALL)).eval()(ids).logits, hmt(ids).logits)
    with pytest.raises(ValueError, match="backbone: expected one without adapters"):
        HMT.from_pretrained(tmp_path, lora(backbone("llama")))
    again = loaded.train()(ids, labels=ids).loss
    again.backward()  # they learn on
    assert any("lora_A" in name and p.grad is not None and p.grad.any() for name, p in loaded.named_parameters())
    named = HMT(lora(backbone("llama"), adapter="books"), HMT.Config(**SMALL)).eval()
    named.save_pretrained(tmp_path / "named")
    with torch.no_grad():
        assert torch.equal(HMT.from_pretrained(tmp_path / "named", backbone("llama"))(ids).logits, named(ids).logits)
    with pytest.raises(ValueError, match="include_backbone: expected False"):
        hmt.save_pretrained(tmp_path, include_backbone=True)


@torch.no_grad()
def test_a_head_with_adapters_has_the_same_loss():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(backbone("llama"), peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"]))
    hmt, ids = HMT(model, HMT.Config(**SMALL)).eval(), text(2, 30)
    with torch.enable_grad():
        loss = hmt(ids, labels=ids).loss
        loss.backward()
    expected = F.cross_entropy(hmt(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    assert any("lm_head.lora_B" in name and p.grad.any() for name, p in hmt.named_parameters() if p.grad is not None)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="backbone: expected adapters inside the layers"):
        HMT(peft.get_peft_model(backbone("llama"), config), HMT.Config(**SMALL))


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected hmt\.safetensors in it"):
        HMT.from_pretrained(tmp_path, backbone("llama"))
    wrapped("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone: expected width 32, got 16"):
        HMT.from_pretrained(tmp_path, backbone("opt"))
    with pytest.raises(ValueError, match="backbone: expected a model, since"):
        HMT.from_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "hmt.safetensors", {"format": "other"})
    with pytest.raises(ValueError, match="folder: expected the format hmlab-hmt-1, got 'other'"):
        HMT.from_pretrained(tmp_path, backbone("llama"))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
@torch.no_grad()
def test_the_authors_weights_give_the_authors_logits(family, tmp_path):
    torch.manual_seed(3)
    model = backbone(family)
    width = model.get_input_embeddings().weight.shape[1]
    own = [torch.randn(1, width), torch.randn(1, width), torch.randn(16, width), torch.randn(16, width)]
    theirs = AuthorsLoop(model, *own, segment_length=8, sensory=3, cache_size=4).eval()
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    fields = SMALL | {"key_norm": False, "query": "prefix"}
    other = backbone(family)
    for weight in other.parameters():
        weight.zero_()
    hmt = HMT(other, HMT.Config(**fields)).eval()
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, tmp_path / "theirs.safetensors")
    hmt.load_authors(tmp_path / "theirs.safetensors")
    for ids in (text(2, 8 * 7), text(2, 8 * 7 + 5)):
        torch.testing.assert_close(hmt(ids).logits, theirs(ids).logits, **CLOSE)
    for missing in ("mem", "wq.weight"):
        some = {name: value for name, value in weights.items() if not name.endswith(f".{missing}")}
        with pytest.raises(ValueError, match=f"weights: expected one tensor called {missing}"):
            hmt.load_authors(some)
    with pytest.raises(ValueError, match="weights: expected the backbone's"):
        hmt.load_authors({k: v for k, v in weights.items() if "norm" not in k})
    with pytest.raises(ValueError, match="config: expected key_norm=False"):
        wrapped(family).load_authors(weights)


def test_the_counted_parameters_are_the_real_ones():
    for memories, norm in ((1, True), (3, False)):
        hmt = wrapped(memories=memories, key_norm=norm)
        counted = added_parameters(32, 16, memories, key_norm=norm)
        assert sum(p.numel() for p in hmt.memory_parameters()) == counted


@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_in_chunks(bias):
    head = torch.nn.Linear(8, VOCAB, bias=bias)
    hidden = torch.randn(2 * CHUNK + 5, 8, requires_grad=True)
    targets = text(2 * CHUNK + 5)
    loss = cross_entropy(hidden, head, targets)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    parameters = [hidden, *head.parameters()]
    for got, wanted in zip(torch.autograd.grad(2 * loss, parameters), torch.autograd.grad(2 * expected, parameters),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    head.requires_grad_(False)
    assert torch.autograd.grad(cross_entropy(hidden, head, targets), hidden)[0].shape == hidden.shape


def test_stages_train_what_they_say():
    """Without recall first; then recall too; then the wrapper alone."""
    hmt = wrapped(sharp=False)
    stages = [Stage(segments=2, steps=2, query="none"), Stage(segments=4, steps=2),
              Stage(segments=3, steps=2, trained="own")]  # fmt: skip
    before, changed = copy.deepcopy(hmt.state_dict()), []
    for metrics in train(hmt, TOKENS, stages, seed=0):
        if metrics.step == 2:
            now = hmt.state_dict()
            changed.append({name for name in now if not torch.equal(now[name], before[name])})
            before = copy.deepcopy(now)
    recall = {"summary", "recall.query.weight", "recall.key.weight", "recall.scale"}
    assert not changed[0] & recall and "memory" in changed[0] and any("backbone" in name for name in changed[0])
    assert recall <= changed[1] and any("backbone" in name for name in changed[1])
    assert changed[2] == recall | {"memory"}
    assert hmt.query == "previous" and all(p.requires_grad for p in hmt.parameters())


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    pattern = {name: torch.arange(2, 12).repeat(len(tokens) // 10) for name, tokens in TOKENS.items()}
    hmt = wrapped(sharp=False)
    found = [metrics.loss for metrics in train(hmt, pattern, two_stages(60, segments=4, learning_rate=3e-3))]
    assert len(found) == 60 and found[-1] < 0.5 < found[0]
    assert losses(hmt, pattern["valid"][None, :200]).mean() < 0.5


@pytest.mark.parametrize("after", [3, 7])
def test_an_interrupted_training_goes_on_to_the_same_numbers(after, tmp_path, monkeypatch):
    monkeypatch.setattr(stages_of, "KEPT_EVERY", 0.0)
    stages = [Stage(segments=2, steps=4, query="none"), Stage(segments=3, steps=5)]
    whole = wrapped(sharp=False)
    expected = [m.loss for m in train(whole, TOKENS, stages, seed=4, folder=tmp_path / "whole")]
    parts, got = wrapped(sharp=False), []
    for metrics in train(parts, TOKENS, stages, seed=4, folder=tmp_path / "parts"):
        got.append(metrics.loss)
        if len(got) == after:
            break
    again = wrapped(sharp=False)
    resumed = [m.loss for m in train(again, TOKENS, stages, seed=4, folder=tmp_path / "parts")]
    # What the last step before the break did is on disk only if the loop came back for more.
    assert got[: 9 - len(resumed)] + resumed == expected and len(resumed) == 9 - after + 1
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert list(train(again, TOKENS, stages, seed=4, folder=tmp_path / "parts")) == []
    with pytest.raises(ValueError, match="folder: expected one without a training or with this one"):
        next(train(again, TOKENS, stages, seed=5, folder=tmp_path / "parts"))
    with pytest.raises(ValueError, match="folder: expected one without a training or with this one"):
        next(train(again, {**TOKENS, "train": TOKENS["valid"]}, stages, seed=4, folder=tmp_path / "parts"))


@pytest.mark.unchecked
def test_bad_stages_are_refused():
    with pytest.raises(ValueError, match="segments: expected at least 3 with recall, got 2"):
        Stage(segments=2, steps=1, query="previous")
    with pytest.raises(ValueError, match="steps: expected at least 8 for 6 segments, got 7"):
        two_stages(7, segments=6)
    with pytest.raises(ValueError, match="tokens: expected more than 24 tokens called 'train'"):
        next(train(wrapped(), {"train": TOKENS["train"][:24]}, [Stage(segments=3, steps=1)]))


def test_the_source_of_an_answer_is_rewarded():
    """The auxiliary loss is the negative logarithm of the weight of the segment that the oracle names."""
    hmt, ids = wrapped(retrieval_loss=0.5).train(), text(2, 40)
    mask, oracle = torch.zeros(2, 40, dtype=torch.bool), torch.full((2, 40), -1)
    mask[0, 33], oracle[0, 33] = True, 9  # asked in segment 4, planted in segment 1
    mask[1, 17], oracle[1, 17] = True, 18  # planted in the segment itself: nothing to recall
    batch = Batch(tokens=ids, targets=ids.roll(-1, 1), mask=mask, oracle=oracle)
    weights, hook = [], hmt.recall.register_forward_hook(lambda module, given, out: weights.append(out[1]))
    with auxiliary.collect() as asked:
        loss = hmt.loss_sum(batch)
    hook.remove()
    torch.testing.assert_close(asked["recall"], -0.5 * weights[4][0, 1, 0])
    hmt.zero_grad()
    asked["recall"].backward(retain_graph=True)
    assert hmt.recall.query.weight.grad.any() and hmt.summary.grad.any()
    expected = F.cross_entropy(hmt(ids).logits[mask], batch.targets[mask], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    total = training.total_loss(hmt, batch)
    torch.testing.assert_close(total, loss + asked["recall"] * mask.sum(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_perplexities_are_reported():
    hmt, ids = wrapped(), text(2, 8 * 9 + 3)
    found = perplexities(hmt, ids)
    assert found["query"].values.tolist() == ["previous", "prefix", "none"] and found.sizes["segment"] == 9
    for query in found["query"].values:
        logits = hmt(ids[:, :72], query=str(query)).logits
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:73].flatten(), reduction="none").view(2, 9, 8)
        one = found.sel(query=query)
        torch.testing.assert_close(torch.tensor(one["nats"].sel(part="first").values), nats[..., :3].mean(-1).double(),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
        assert math.isclose(one["perplexity"].sel(parts="all"), math.exp(nats.mean()), rel_tol=1e-4)
        assert math.isclose(one["perplexity"].sel(parts="rest"), math.exp(nats[..., 3:].mean()), rel_tol=1e-4)
    with pytest.raises(ValueError, match="ids: expected more than a segment"):
        perplexities(hmt, ids[:, :8])


@torch.no_grad()
def test_a_book_is_read_through_interruptions(tmp_path, monkeypatch, capsys):
    hmt, ids = wrapped(), text(1, 8 * 16 * 5 + 5)
    whole = book.read(hmt, ids, show=False)
    logits = hmt(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(whole.loss, expected, rel_tol=1e-5) and whole.tokens == ids.shape[1]

    call, path, calls = book._call, tmp_path / "book.safetensors", []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(*given)

    monkeypatch.setattr(book, "_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        book.read(hmt, ids, path)
    assert "reading" in capsys.readouterr().err
    again = book.read(hmt, ids, path, show=False)
    assert len(calls) == 3 + 4  # six calls in all; two were done
    assert math.isclose(again.loss, whole.loss, rel_tol=1e-6)
    assert torch.equal(again.state.cache, whole.state.cache) and torch.equal(again.state.last, whole.state.last)
    done = book.read(hmt, ids, path, show=False)
    assert len(calls) == 7 and done.loss == again.loss
    assert state_bytes(done.state) == state_bytes(whole.state)
    with pytest.raises(ValueError, match=r"path: expected a file that does not exist or belongs to this text"):
        book.read(hmt, text(1, 50), path)
    with pytest.raises(ValueError, match=r"belongs to this model"):
        book.read(wrapped(recall_dim=8), ids, path)
    with pytest.raises(ValueError, match=r"belongs to this model"):
        other = copy.deepcopy(hmt)
        other.backbone.lm_head.weight.mul_(1.1)
        book.read(other, ids, path)
