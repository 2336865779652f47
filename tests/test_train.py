"""The training loop against a plain one, and against what may go wrong in it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hmlab import model as models
from hmlab.diagnosis import SETTLED, Instability
from hmlab.memories import lmn
from hmlab.tasks import Batch, language
from hmlab.train import Config, Metrics, begin, evaluate, learning_rate, train

DATA = language.Config(batch=2, context=12).open()
RECIPE = Config(steps=8, evaluate_every=4, evaluate_batches=2)


def build(seed: int = 0, **fields) -> models.LanguageModel:
    torch.manual_seed(seed)
    memory = lmn.Config(dim=8, heads=2, banks=1)
    return models.Config(vocab=DATA.vocab_size, dim=8, memory=memory, layers=2, **fields).build()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Given:
    """The batches of a list, over and over, for training and evaluation alike."""

    def __init__(self, *batches: Batch) -> None:
        self.given = batches

    def batches(self, split: str, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            yield from self.given

    def evaluation_batches(self, split: str, count: int, seed: int) -> Iterator[Batch]:
        return islice(self.batches(split, torch.Generator()), count)


def some(count: int, batch: int = 2, time: int = 12) -> list[Batch]:
    data = language.Config(batch=batch, context=time).open()
    return list(data.evaluation_batches("train", count, 7))


def test_is_plain_adamw() -> None:
    config = replace(RECIPE, clip=0.3, weight_decay=0.1, warmup=3)
    model, plain = build(), build()
    losses = [m.loss for m in train(model, DATA, config, seed=3)]

    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1, fused=True)
    batches, expected = DATA.batches("train", torch.Generator().manual_seed(3)), []
    for step in range(8):
        batch = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(batch.tokens)[0].flatten(0, 1), batch.targets.flatten(), reduction="sum") / 24
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 3)
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(plain), strict=True))


def test_accumulated_batches_are_one_batch_even_with_unequal_masks() -> None:
    first, second = some(2)
    second = second._replace(mask=second.mask & (torch.arange(12) < 3))
    both = Batch(*(torch.cat(parts) for parts in zip(first[:3], second[:3], strict=True)))
    apart, together = build(), build()
    a = list(train(apart, Given(first, second), replace(RECIPE, accumulate=2)))
    b = list(train(together, Given(both), RECIPE))
    assert [m.loss for m in a] == pytest.approx([m.loss for m in b], abs=1e-5)
    assert [m.gradient_norm for m in a] == pytest.approx([m.gradient_norm for m in b], rel=1e-4)
    assert a[-1].tokens == b[-1].tokens == 8 * 4 * 12


def test_padding_counts_neither_as_tokens_nor_as_targets() -> None:
    batch = some(1)[0]
    valid = torch.arange(12).expand(2, 12) < 9
    padded = batch._replace(mask=batch.mask & valid, valid=valid)
    short = Batch(*(part[:, :9] for part in batch[:3]))
    a, b = (list(train(build(), Given(given), RECIPE)) for given in (padded, short))
    assert [m.loss for m in a] == pytest.approx([m.loss for m in b], abs=1e-5)
    assert a[-1].tokens == b[-1].tokens == 8 * 2 * 9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, *(0.1 + 0.9 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3, 4))]),
        ("step", [0.5, 1.0, 1.0, 0.1, 0.1, 0.1]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    config = Config(
        steps=6, learning_rate=1.0, schedule=schedule, warmup=2, learning_rate_floor=0.1, decay_every=3
    )
    assert [learning_rate(config, step) for step in range(1, 7)] == pytest.approx(expected)


def test_memory_parameters_have_their_own_momentum_and_rate() -> None:
    model = build()
    before = weights(model)
    inside = {id(p) for p in model.memory_parameters()}
    config = replace(RECIPE, memory_betas=(0.5, 0.9), memory_learning_rate_factor=0.0)
    progress = begin(model, config)
    list(train(model, DATA, config, progress=progress))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == (id(parameter) in inside)
    betas = {id(p): group["betas"] for group in progress.optimizer.param_groups for p in group["params"]}
    assert all(betas[id(p)] == ((0.5, 0.9) if id(p) in inside else (0.9, 0.999)) for p in model.parameters())


def test_looking_changes_nothing() -> None:
    def draw(module: nn.Module, *_: object) -> None:
        if not module.training:
            torch.rand(())

    def losses(every: int) -> list[float]:
        model = build(dropout=0.2)
        model.register_forward_hook(draw)
        return [m.loss for m in train(model, DATA, replace(RECIPE, evaluate_every=every))]

    assert losses(1) == losses(8)


def test_evaluates_in_evaluation_mode_when_due_and_at_the_end() -> None:
    model = build(dropout=0.5)
    metrics = list(train(model, DATA, replace(RECIPE, evaluate_every=3)))
    assert [m.step for m in metrics if not math.isnan(m.valid_loss)] == [3, 6, 8]
    assert model.training
    model.eval()
    with torch.no_grad():
        batches = list(DATA.evaluation_batches("valid", 2, 0))
        expected = sum(F.cross_entropy(model(b.tokens)[0].flatten(0, 1), b.targets.flatten()) for b in batches) / 2
    assert metrics[-1].valid_loss == pytest.approx(float(expected), abs=1e-5)
    assert metrics[-1].train_loss != metrics[-1].valid_loss
    assert evaluate(model, batches) == pytest.approx(float(expected), abs=1e-5)


def test_goes_on_from_its_state_bit_for_bit() -> None:
    config = replace(RECIPE, steps=2 * SETTLED, evaluate_every=5, clip=1.0)
    whole_model = build(dropout=0.2)
    whole = begin(whole_model, config, seed=5)
    curve = list(train(whole_model, DATA, config, progress=whole))

    model = build(dropout=0.2)
    progress = begin(model, config, seed=5)
    loop = train(model, DATA, config, progress=progress)
    part = list(islice(loop, SETTLED + 3))
    tensors, facts = progress.state()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    parameters = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    drawn = random.random(), float(np.random.rand())
    next(loop)  # what happens after the state was taken does not matter

    other = build(seed=9, dropout=0.2)
    other.load_state_dict(parameters)
    resumed = begin(other, config, seed=77)
    resumed.restore(kept, facts)
    assert (random.random(), float(np.random.rand())) == drawn
    rest = list(train(other, DATA, config, progress=resumed))

    def numbers(metrics: list[Metrics]) -> list[tuple]:
        same = [replace(m, elapsed=0.0, tokens_per_second=0.0, memory_bytes=0) for m in metrics]
        return [tuple(repr(value) for value in vars(m).values()) for m in same]

    assert numbers(part + rest) == numbers(curve)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(whole_model), strict=True))
    after, expected = resumed.state()[0], whole.state()[0]
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[key], expected[key]) for key in after)


def test_deterministic_mode_ends_with_each_step() -> None:
    seen = []
    model = build()
    model.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    for _ in train(model, DATA, RECIPE):
        assert not torch.are_deterministic_algorithms_enabled()
    assert all(seen)
    seen.clear()
    list(train(model, DATA, replace(RECIPE, deterministic=False)))
    assert not any(seen)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    model, seen = build(), []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    low = [m.loss for m in train(model, DATA, replace(RECIPE, precision="bfloat16"))]
    high = [m.loss for m in train(build(), DATA, RECIPE)]
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert low == pytest.approx(high, abs=0.05)
    assert low != high


class Broken(nn.Module):
    """A module that turns NaN, in its output or in its gradient."""

    def __init__(self, inner: nn.Module, *, output: bool) -> None:
        super().__init__()
        self.inner, self.output = inner, output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.output:
            return y.masked_fill(torch.arange(y.shape[-1]) == 0, math.nan)
        y.register_hook(lambda gradient: gradient * math.inf)
        return y


def fails(model: nn.Module) -> Instability:
    before = weights(model)
    with pytest.raises(Instability) as caught:
        list(train(model, DATA, RECIPE))
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(weights(model), before, strict=True))
    return caught.value


def test_names_a_non_finite_parameter() -> None:
    model = build()
    with torch.no_grad():
        model.blocks[1].feedforward[0].weight[0, 0] = math.inf
    error = fails(model)
    assert (error.kind, error.module, error.step, error.value) == ("parameter", "blocks.1.feedforward.0", 1, math.inf)
    assert str(error) == "step 1: the parameter of blocks.1.feedforward.0 (weight) is inf"


def test_names_the_first_non_finite_activation() -> None:
    model = build()
    model.blocks[1].feedforward[1] = Broken(nn.SiLU(), output=True)
    error = fails(model)
    assert (error.kind, error.module) == ("activation", "blocks.1.feedforward.1")
    assert math.isnan(error.value)


def test_names_where_a_non_finite_gradient_began() -> None:
    model = build()
    model.blocks[0].feedforward[2] = Broken(model.blocks[0].feedforward[2], output=False)
    error = fails(model)
    assert (error.kind, error.module) == ("gradient", "blocks.0.feedforward.2.inner")


def test_names_a_non_finite_loss_of_finite_activations() -> None:
    model = build()
    with torch.no_grad():
        model.head.bias.fill_(3e38)[::2] = -3e38
    error = fails(model)
    assert (error.kind, error.module, str(error)) == ("loss", "", "step 1: the loss is inf")


def test_names_a_step_that_broke_the_model_when_it_was_the_last() -> None:
    model = build()
    config = replace(RECIPE, steps=1, learning_rate=3e38)
    with pytest.raises(Instability) as caught:
        list(train(model, DATA, config))
    assert caught.value.step == 1


def test_flags_spikes_and_names_where_the_gradient_grew() -> None:
    model, at = build(), SETTLED + 2
    parameter, now = model.blocks[1].feedforward[0].weight, [0]
    parameter.register_hook(lambda gradient: gradient * (1000 if now[0] == at else 1))
    found = {}
    for metrics in train(model, DATA, replace(RECIPE, steps=at + 6, evaluate_every=100)):
        now[0] = metrics.step + 1
        if metrics.spike:
            found[metrics.step] = metrics
    assert list(found) == [at]
    (spike,) = found[at].spikes
    assert found[at].spike == 2
    assert (spike.step, spike.kind, spike.module) == (at, "gradient_norm", "blocks.1.feedforward.0")
    assert 100 < spike.growth < 10_000
    assert spike.value == found[at].gradient_norm > 5 * spike.median


def test_flags_a_spike_of_the_loss() -> None:
    model, at = build(), SETTLED + 2
    spikes = []
    for metrics in train(model, DATA, replace(RECIPE, steps=at, learning_rate=1e-5, evaluate_every=100)):
        spikes.append(metrics.spike)
        if metrics.step == at - 1:
            with torch.no_grad():
                model.head.bias[0] += 20.0
    assert spikes[:-1] == [0] * (at - 1)
    assert spikes[-1] & 1


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("learning_rate", 0.0), ("betas", (0.9, 1.0)), ("memory_betas", (0.9,)), ("clip", -1.0),
     ("schedule", "linear"), ("precision", "float16"), ("warmup", -1)],
)  # fmt: skip
def test_refuses_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: expected .* got "):
        Config(**{field: value})
