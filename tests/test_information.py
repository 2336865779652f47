"""Information measures against closed forms and scipy, estimators against their exact bias, densities against a plain
token-by-token account; streaming, causality, documents and padding."""

import math
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hmlab import information
from hmlab.information import estimators
from hmlab.information.statistics import hash_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_DENSITIES = ("surprisal", "conditional_entropy", "mutual_information", "kl", "js")
EVERY_DENSITY = tuple(information.DENSITIES)
each_density = pytest.mark.parametrize("name", EVERY_DENSITY)
each_method = pytest.mark.parametrize("method", list(information.ESTIMATORS))
each_horizon = pytest.mark.parametrize("horizon", [None, 8, 20])


def tensor(*values):
    return torch.tensor(*values, dtype=torch.float64, device=DEVICE)


# Measures


def test_closed_forms():
    for n in (1, 2, 3, 64):
        assert information.entropy(torch.ones(n, device=DEVICE)).item() == pytest.approx(math.log2(n), abs=1e-6)
    assert information.entropy(tensor([8, 4, 2, 1, 1])).item() == 1.875  # dyadic: exact
    assert information.perplexity(information.entropy(torch.ones(8, device=DEVICE))).item() == pytest.approx(8)
    p = 0.11
    h = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert information.entropy(tensor([p, 1 - p])).item() == pytest.approx(h)
    # A binary symmetric channel: H(Y|X) = h(p), I = 1 - h(p).
    channel = tensor([[1 - p, p], [p, 1 - p]])
    assert information.conditional_entropy(channel).item() == pytest.approx(h)
    assert information.mutual_information(channel).item() == pytest.approx(1 - h)
    a, b = tensor([0.5, 0.5, 0]), tensor([0.25, 0.5, 0.25])
    assert information.kl_divergence(a, b).item() == pytest.approx(0.5)
    assert information.cross_entropy(a, b).item() == pytest.approx(1.5)
    assert information.kl_divergence(b, a).item() == information.cross_entropy(b, a).item() == math.inf
    assert information.js_divergence(tensor([1, 0]), tensor([0, 1])).item() == 1
    assert information.js_divergence(a, a).item() == 0


WEIGHTS = arrays(np.float64, (3, 4), elements=st.one_of(st.just(0.0), st.floats(1e-3, 1e3)))
proper = WEIGHTS.filter(lambda w: (w.sum(1) > 0).all())


@settings(max_examples=60, deadline=None)
@given(proper, proper)
def test_measures_agree_with_scipy(a, b):
    p, q = torch.tensor(a, device=DEVICE), torch.tensor(b, device=DEVICE)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(information.entropy(p).cpu(), scipy.stats.entropy(a, base=2, axis=1), **close)
    kl = scipy.stats.entropy(a, b, base=2, axis=1)
    np.testing.assert_allclose(information.kl_divergence(p, q).cpu(), kl, **close)
    mean = a / a.sum(1, keepdims=True) + b / b.sum(1, keepdims=True)
    js = sum(scipy.stats.entropy(x, mean, base=2, axis=1) for x in (a, b)) / 2
    np.testing.assert_allclose(information.js_divergence(p, q).cpu(), js, **close)


@settings(max_examples=60, deadline=None)
@given(proper)
def test_chain_rule_and_additivity(a):
    joint = torch.tensor(a, device=DEVICE)
    x, y = joint.sum(1), joint.sum(0)
    h = information.entropy
    conditional, mutual = information.conditional_entropy(joint), information.mutual_information(joint)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(h(x) + conditional, h(joint.flatten()), **close)
    torch.testing.assert_close(h(y) - conditional, mutual, **close)
    torch.testing.assert_close(mutual, information.mutual_information(joint.T), **close)
    independent = x[:, None] * y
    torch.testing.assert_close(h(independent.flatten()), h(x) + h(y), **close)
    torch.testing.assert_close(information.mutual_information(independent), torch.zeros_like(mutual), **close)
    cross = information.cross_entropy(joint[0], joint[1])
    if cross.isfinite():
        torch.testing.assert_close(cross, h(joint[0]) + information.kl_divergence(joint[0], joint[1]), **close)


def test_what_slots_tell_reads_adds_up():
    weights = torch.rand(5, 7, 4, dtype=torch.float64, device=DEVICE).softmax(-1)
    weights[..., 2] = 0.25  # read alike by all
    weights[..., [0, 1, 3]] *= 0.75 / weights[..., [0, 1, 3]].sum(-1, keepdim=True)
    told = information.read_information(weights)
    torch.testing.assert_close(told.sum(-1), information.mutual_information(weights))
    assert told[:, 2].abs().max() < 1e-12 and told.sum() > 0


def test_gradients_of_measures_are_right_and_finite_at_zero():
    p = torch.rand(2, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for measure in (information.entropy, information.conditional_entropy, information.mutual_information,
                    information.read_information):  # fmt: skip
        assert torch.autograd.gradcheck(measure, p)
    q = torch.rand(2, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for measure in (information.kl_divergence, information.js_divergence, information.cross_entropy):
        assert torch.autograd.gradcheck(measure, (p, q))
    zero = tensor([0.0, 1, 3]).requires_grad_()
    (information.entropy(zero) + information.js_divergence(zero, tensor([0, 2, 1]))).backward()
    assert zero.grad.isfinite().all()


def test_bits_of_predictions():
    logits = torch.randn(2, 5, 7, dtype=torch.float64, device=DEVICE)
    targets = torch.randint(7, (2, 5), device=DEVICE)
    one_hot = torch.nn.functional.one_hot(targets, 7)
    expected = information.cross_entropy(one_hot, logits.softmax(-1))
    torch.testing.assert_close(information.prediction_bits(logits, targets), expected)
    torch.testing.assert_close(information.prediction_bits(logits, targets + 14), expected)  # hashed by the classes
    uniform = information.prediction_bits(torch.zeros(3, 16, device=DEVICE), torch.arange(3, device=DEVICE))
    assert uniform.tolist() == pytest.approx([4.0] * 3)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("order", [1, 2])
def test_spectral_entropy_is_that_of_the_squared_singular_values(shape, order):
    keys = torch.randn(3, 2, *shape, dtype=torch.float64, device=DEVICE)
    p = torch.linalg.svdvals(keys).square()
    p = p / p.sum(-1, keepdim=True)
    expected = information.entropy(p) if order == 1 else -p.square().sum(-1).log2()
    for scale in (1, 1e-200, 1e150):
        torch.testing.assert_close(information.spectral_entropy(scale * keys, order), expected)


@pytest.mark.parametrize("order", [1, 2])
def test_spectral_entropy_of_known_keys(order):
    def of(keys):
        return information.spectral_entropy(keys.to(DEVICE), order).item()

    assert of(torch.eye(8)) == pytest.approx(3, abs=1e-5)
    assert of(torch.ones(8, 5)) == pytest.approx(0, abs=1e-5)
    assert of(torch.eye(8).repeat(4, 1)) == pytest.approx(3, abs=1e-5)
    assert of(torch.cat((torch.eye(4), torch.zeros(9, 4)))) == pytest.approx(2, abs=1e-5)
    assert of(torch.zeros(6, 3)) == 0
    assert of(torch.zeros(6, 3).fill_diagonal_(2).double()) == pytest.approx(math.log2(3))
    keys = torch.randn(64, 32)
    assert 4 < information.spectral_entropy(keys, 2) < information.spectral_entropy(keys, 1) < 5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_spectral_entropy_has_the_right_gradient_also_at_equal_eigenvalues(order, shape):
    def measure(keys):
        return information.spectral_entropy(keys, order)

    keys = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(measure, keys)
    # Four eigenvalues, two and two of them equal: no difference of eigenvalues may divide.
    equal = tensor([1.0, 1, 2, 2]).diag()
    equal = torch.nn.functional.pad(equal, (0, shape[1] - 4, 0, shape[0] - 4)).requires_grad_()
    assert torch.autograd.gradcheck(measure, equal)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("keys", [torch.zeros(5, 3), torch.ones(5, 3), torch.eye(5), torch.eye(5)[:2].repeat(3, 1)])
def test_spectral_entropy_has_a_finite_gradient_where_keys_are_degenerate(keys, order):
    keys = keys.clone().to(DEVICE).requires_grad_()
    information.spectral_entropy(keys, order).backward()
    assert keys.grad.isfinite().all() and keys.grad.abs().max() < 1


# Estimators


def exact_bias(method, p, samples, estimate=information.estimate_entropy, true=information.entropy):
    """Mean of an estimate over every outcome of so many samples, minus the truth: nothing is drawn."""
    cells = p.numel()
    tables = [t for t in product(range(samples + 1), repeat=cells) if sum(t) == samples]
    chance = scipy.stats.multinomial(samples, p.flatten().numpy()).pmf(np.array(tables))
    found = estimate(torch.tensor(tables).view(-1, *p.shape), method)
    return (found @ torch.tensor(chance) - true(p)).item()


@pytest.mark.parametrize("p, samples", [([1, 1], 10), ([1, 3], 12), ([1, 1, 1], 8), ([5, 3, 2], 20), ([1] * 4, 12)])
def test_corrected_entropy_is_less_biased_in_every_outcome_counted(p, samples):
    p = torch.tensor(p, dtype=torch.float64) / sum(p)
    bias = {method: exact_bias(method, p, samples) for method in information.ESTIMATORS}
    assert bias["plug-in"] < 0
    for method in ("miller-madow", "grassberger"):
        assert abs(bias[method]) < 0.6 * abs(bias["plug-in"]), bias


def test_corrected_mutual_information_is_less_biased_in_every_outcome_counted():
    for joint in ([[1, 1], [1, 1]], [[3, 1], [1, 3]]):
        joint = torch.tensor(joint, dtype=torch.float64) / sum(map(sum, joint))
        for estimate, true in ((information.estimate_mutual_information, information.mutual_information),
                               (information.estimate_conditional_entropy, information.conditional_entropy)):
            bias = {m: abs(exact_bias(m, joint, 16, estimate, true)) for m in information.ESTIMATORS}
            assert bias["grassberger"] < bias["plug-in"] and bias["miller-madow"] < bias["plug-in"], bias


def test_few_samples_of_many_outcomes():
    """Zipf's law over 100 outcomes, 64 samples, 2000 times: the order of the biases holds at 5 standard errors."""
    p = 1 / torch.arange(1, 101, dtype=torch.float64)
    drawn = torch.multinomial(p.expand(2000, -1), 64, replacement=True)
    counts = torch.zeros(2000, 100, dtype=torch.int64).scatter_add(1, drawn, torch.ones_like(drawn))
    error = {m: (information.estimate_entropy(counts, m) - information.entropy(p)) for m in information.ESTIMATORS}
    for worse, better in (("plug-in", "miller-madow"), ("miller-madow", "grassberger")):
        difference = error[better] - error[worse]
        assert difference.mean() > 5 * difference.std() / 2000**0.5
        assert error[better].mean() < 0  # nearer to the truth, and not beyond it
    assert abs(error["grassberger"].mean()) < abs(error["plug-in"].mean()) / 3


def test_estimates_agree_with_their_definitions():
    counts = torch.tensor([3, 0, 1, 4, 7])
    assert information.estimate_entropy(counts, "plug-in").item() == pytest.approx(
        scipy.stats.entropy(counts, base=2))  # fmt: skip
    # Grassberger's G by his recursion, eq. 31: G_1 = -γ - ln 2, G_2 = 2 + G_1, G_2n+1 = G_2n, G_2n+2 = G_2n + 2/(2n+1).
    g = {1: -np.euler_gamma - math.log(2)}
    for n in range(2, 8):
        g[n] = g[n - 1] if n % 2 else g.get(n - 2, g[1]) + 2 / (n - 1)
    expected = scipy.special.digamma(15) - sum(n * g[n] for n in counts.tolist() if n) / 15
    assert information.estimate_entropy(counts).item() == pytest.approx(expected / math.log(2))
    plug_in = information.estimate_entropy(counts, "plug-in")
    corrected = information.estimate_entropy(counts, "miller-madow")
    assert (corrected - plug_in).item() == pytest.approx(3 / 30 / math.log(2))


@each_method
def test_estimates_keep_the_chain_rule_and_approach_the_truth(method):
    joint = torch.rand(2, 3, 5, dtype=torch.float64)
    counts = (joint * 1e7).long()
    h, conditional = information.estimate_entropy, information.estimate_conditional_entropy(counts, method)
    mutual = information.estimate_mutual_information(counts, method)
    torch.testing.assert_close(h(counts.sum(-1), method) + conditional, h(counts.flatten(1), method))
    torch.testing.assert_close(mutual, information.estimate_mutual_information(counts.mT, method))
    torch.testing.assert_close(conditional, information.conditional_entropy(joint), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mutual, information.mutual_information(joint), rtol=1e-4, atol=1e-4)


def test_counts_of_samples():
    x, y = torch.randint(-2, 3, (2, 400), device=DEVICE)
    table = information.joint_counts(x, y)
    assert table.shape == (5, 5) and table.sum() == 400
    assert table[1, 4] == ((x == -1) & (y == 2)).sum()
    assert torch.equal(information.joint_counts(x), table.sum(1))


@pytest.mark.parametrize("statistic", ["entropy", "mutual_information"])
def test_jackknife_standard_error_is_the_scatter(statistic, monkeypatch):
    """The mean standard error over 300 draws is within 15 % of the standard deviation of 4000 draws, whose own
    standard error is near 1 %."""
    estimate = partial(getattr(information, f"estimate_{statistic}"), method="miller-madow")
    shape = (4,) if statistic == "entropy" else (2, 3)
    p = torch.arange(1.0, 1 + math.prod(shape))
    drawn = torch.multinomial(p.expand(4000, -1), 200, replacement=True)
    counts = torch.zeros(4000, len(p), dtype=torch.int64).scatter_add(1, drawn, torch.ones_like(drawn))
    counts = counts.view(-1, *shape)
    errors = torch.stack([information.standard_error(estimate, c) for c in counts[:300]])
    assert errors.mean().item() == pytest.approx(estimate(counts).std().item(), rel=0.15)
    monkeypatch.setattr(estimators, "JACKKNIFE_ENTRIES", 2 * len(p))
    torch.testing.assert_close(information.standard_error(estimate, counts[0]), errors[0])


# Densities


def account(tokens, config, reset, valid):
    """Every density of one row, token by token, as the definitions say; and how many counts there are at the end."""
    size, horizon, k, c = config.segment, config.horizon, config.table, config.concentration
    out = {name: [] for name in TOKEN_DENSITIES}
    document, generation = [], []  # (bucket, pair or None, token), and the generation of each

    def count(of, until, now):
        """Weighted number of entries for which `of` holds among the first `until`, seen from generation and weight."""
        current, weight = now
        entries = zip(document[:until], generation[:until], strict=True)
        return sum((1 if g == current else weight if g == current - 1 else 0) * of(e) for e, g in entries)

    for s in range(0, len(tokens), size):
        part, now = [], None
        for t in range(s, s + size):
            if reset[t] or now is None:
                if reset[t]:
                    document, generation = [], []
                part, start = [], len(document)
                now = (0, 1) if horizon is None else (start // horizon, 1 - start % horizon / horizon)
            if not valid[t]:
                continue
            token = tokens[t]
            x = token % k
            pair = int(hash_pair(torch.tensor(document[-1][2]), torch.tensor(token), config.bigram_table)) \
                if document else None
            here = len(document)
            n, total = count(lambda e, x=x: e[0] == x, here, now), count(lambda e: True, here, now)
            q = (n + c / k) / (total + c)
            q_pair = q
            if document:
                previous = document[-1][0]
                context = count(lambda e, y=previous: e[0] == y, here - 1, now)
                both = min(count(lambda e, z=pair: e[1] == z, here, now), n, context)
                q_pair = (both + c * q) / (context + c)
            before, all_before = count(lambda e, x=x: e[0] == x, start, now), count(lambda e: True, start, now)
            recent = [e[0] for e in document[max(0, start - size) : start]]
            m = recent.count(x)
            older = (max(before - m, 0) + c / k) / (max(all_before - len(recent), 0) + c)
            gain = (m + c * older) / (len(recent) + c) / older
            part.append((x, q, q_pair, gain, (before + c / k) / (all_before + c)))
            document.append((x, pair, token))
            generation.append(now[0])
        p = {x: n / len(part) for x, n in Counter(x for x, *_ in part).items()}
        q = {x: last for x, *_, last in part}
        outside = 1 - sum(q.values())
        mean = {x: (p[x] + q[x]) / 2 for x in p}
        values = dict.fromkeys(TOKEN_DENSITIES, 0.0) if not part else {
            "surprisal": -np.mean([math.log2(e[1]) for e in part]),
            "conditional_entropy": -np.mean([math.log2(e[2]) for e in part]),
            "mutual_information": np.mean([math.log2(e[3]) for e in part]),
            "kl": sum(p[x] * math.log2(p[x] / q[x]) for x in p),
            "js": (sum(p[x] * math.log2(p[x] / mean[x]) + q[x] * math.log2(q[x] / mean[x]) for x in p) + outside) / 2,
        }  # fmt: skip
        for name, value in values.items():
            out[name].append(value)
    return out


def rows(batch=3, segments=7, segment=6, ids=9, padding=0.0, documents=0.1):
    shape = (batch, segments * segment)
    tokens = torch.randint(ids, shape, device=DEVICE) * torch.randint(2, shape, device=DEVICE)
    reset = torch.rand(shape, device=DEVICE) < documents
    valid = torch.rand(shape, device=DEVICE) >= padding
    return tokens, reset, valid


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_horizon
@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("table, bigram_table", [(16, 4096), (4, 5)])
@pytest.mark.parametrize("documents", [0.0, 0.08])
def test_densities_are_those_of_a_plain_account(horizon, padding, table, bigram_table, documents, double):
    config = information.DensityConfig(densities=TOKEN_DENSITIES, segment=6, table=table, bigram_table=bigram_table,
                                       concentration=2.5, horizon=horizon)  # fmt: skip
    tokens, reset, valid = rows(padding=padding, documents=documents)
    given_statistics = config.init_statistics(3, device=DEVICE)
    found, _ = information.segment_density(tokens, given_statistics, config, reset=reset, valid=valid)
    for row in range(3):
        expected = account(tokens[row].tolist(), config, reset[row].tolist(), valid[row].tolist())
        for i, name in enumerate(TOKEN_DENSITIES):
            assert found[row, :, i].tolist() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def everything(**fields):
    """A configuration of every density, and what they need of 3 rows of 7 segments of 6 tokens."""
    config = information.DensityConfig(densities=EVERY_DENSITY, segment=6, table=16, bigram_table=64, **fields)
    keys, logits = torch.randn(3, 2, 42, 5, device=DEVICE), torch.randn(3, 42, 4, device=DEVICE)
    return config, {"keys": keys, "logits": logits}


def cut(sequences, span):
    """The part of every sequence that lies in a span of time."""
    return {name: s[:, :, span] if name == "keys" else s[:, span] for name, s in sequences.items()}


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, 6)), st.sampled_from([None, 6, 15]), st.sampled_from([0.0, 0.3]), st.integers(0, 10**6))
def test_any_split_gives_the_same(splits, horizon, padding, seed):
    torch.manual_seed(seed)
    config, sequences = everything(horizon=horizon)
    sequences["tokens"], sequences["reset"], sequences["valid"] = rows(padding=padding, documents=0.05)
    whole, whole_end = information.segment_density(
        statistics=config.init_statistics(3, device=DEVICE), config=config, **sequences)  # fmt: skip
    statistics, parts = config.init_statistics(3, device=DEVICE), []
    for first, last in zip((0, *sorted(splits)), (*sorted(splits), 7), strict=True):
        part = cut(sequences, slice(6 * first, 6 * last))
        density, statistics = information.segment_density(statistics=statistics, config=config, **part)
        parts.append(density)
    exact = [i for i, name in enumerate(EVERY_DENSITY) if name in TOKEN_DENSITIES]
    assert torch.equal(torch.cat(parts, 1)[..., exact], whole[..., exact])
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert all(torch.equal(a, b) for a, b in zip(statistics, whole_end, strict=True))


@each_density
@each_horizon
def test_the_future_changes_nothing_and_the_present_does(name, horizon):
    config, sequences = everything(horizon=horizon)
    sequences["tokens"] = rows()[0]
    start = config.init_statistics(3, device=DEVICE)
    density = information.segment_density(statistics=start, config=config, **sequences)[0]
    column = EVERY_DENSITY.index(name)
    for segment in range(7):
        other = {key: value.clone() for key, value in sequences.items()}
        future = cut(other, slice(6 * segment, None))
        future["tokens"].copy_((future["tokens"] + 1 + torch.arange(42 - 6 * segment, device=DEVICE) % 7) % 16)
        future["keys"].normal_()
        future["logits"].normal_()
        changed = information.segment_density(statistics=start, config=config, **other)[0]
        assert torch.equal(changed[:, :segment], density[:, :segment])
        if (name, segment) != ("mutual_information", 0):  # nothing comes before the first segment
            assert (changed[:, segment, column] != density[:, segment, column]).any()


def test_a_document_knows_nothing_of_the_one_before_it():
    config, sequences = everything(horizon=8)
    sequences["tokens"] = rows()[0]
    reset = torch.zeros(3, 42, dtype=torch.bool, device=DEVICE)
    reset[:, 18] = True
    start = config.init_statistics(3, device=DEVICE)
    packed, end = information.segment_density(statistics=start, config=config, reset=reset, **sequences)
    alone, alone_end = information.segment_density(statistics=start, config=config, **cut(sequences, slice(18, None)))
    torch.testing.assert_close(packed[:, 3:], alone)
    assert all(torch.equal(a, b) for a, b in zip(end, alone_end, strict=True))


def test_rows_of_padding_keep_their_statistics_and_do_not_touch_others():
    config, sequences = everything()
    sequences["tokens"], _, _ = rows()
    start = information.segment_density(rows()[0], config.init_statistics(3, device=DEVICE), everything()[0],
                                        **{k: v for k, v in sequences.items() if k != "tokens"})[1]  # fmt: skip
    valid = torch.tensor([True, False, True], device=DEVICE)[:, None].expand(3, 42)
    sequences["keys"][1] = sequences["logits"][1] = math.nan
    density, end = information.segment_density(statistics=start, config=config, valid=valid, **sequences)
    assert (density[1] == 0).all() and density.isfinite().all()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(start, end, strict=True))
    without = {key: value[[0, 2]] for key, value in sequences.items()}
    others = information.Statistics(*(t[[0, 2]] for t in start))
    expected, _ = information.segment_density(statistics=others, config=config, **without)
    torch.testing.assert_close(density[[0, 2]], expected)


def test_counts_hold_every_token_of_the_horizon_and_their_size_stays():
    config = information.DensityConfig(segment=4, table=8, bigram_table=32, horizon=12)
    statistics = config.init_statistics(1, device=DEVICE)
    size = sum(t.numel() for t in statistics)
    for call in range(1, 30):
        tokens = torch.randint(20, (1, 4), device=DEVICE)
        _, statistics = information.segment_density(tokens, statistics, config)
        assert statistics.position.item() == 4 * call and torch.equal(statistics.recent, tokens)
        current = 4 * call % 12
        assert statistics.unigrams.sum(-1).tolist() == [[current, min(12, 4 * call - current)]]
        assert sum(t.numel() for t in statistics) == size
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in statistics)


def test_long_counts_do_not_overflow():
    config = information.DensityConfig(densities=("surprisal", "kl"), segment=4, table=8, concentration=1.0)
    start = config.init_statistics(1, device=DEVICE)
    start.unigrams[0, 0, 3] = start.position[0] = 2**40
    density, end = information.segment_density(torch.full((1, 4), 3, device=DEVICE), start, config)
    assert end.unigrams[0, 0, 3] == 2**40 + 4
    assert density.abs().max() < 1e-6


def test_known_texts_have_known_densities():
    config = information.DensityConfig(densities=TOKEN_DENSITIES, segment=64, table=256, concentration=4.0)
    start, t = config.init_statistics(1, device=DEVICE), torch.arange(64 * 200, device=DEVICE)
    index = {name: i for i, name in enumerate(TOKEN_DENSITIES)}

    def last(tokens):
        return information.segment_density(tokens[None], start, config)[0][0, -1]

    # A cycle of 8: 3 bits a token without its neighbour, none with it; every segment is like all before.
    cycle = last(t % 8)
    assert cycle[index["surprisal"]].item() == pytest.approx(3, abs=0.01)
    assert cycle[index["conditional_entropy"]].item() == pytest.approx(0, abs=0.02)
    assert cycle[[index["kl"], index["js"], index["mutual_information"]]].abs().max() < 0.01
    # Uniform noise: the neighbour tells nothing.
    noise = torch.randint(8, (64 * 200,), device=DEVICE)
    mean = information.segment_density(noise[None], start, config)[0][0, 100:].mean(0)
    assert mean[index["surprisal"]].item() == pytest.approx(3, abs=0.02)
    assert mean[index["conditional_entropy"]].item() == pytest.approx(3, abs=0.1)
    # A segment of news has nothing in common with what was; the next one like it is told by it.
    news = torch.cat((noise, noise[-64:] + 100))
    assert last(news)[index["js"]].item() == pytest.approx(1, abs=0.02)
    assert last(news)[index["kl"]] > 6 and last(torch.cat((news, noise[-64:] + 100)))[index["mutual_information"]] > 4


def test_collisions_of_pairs_never_count_more_than_either_token():
    tokens = torch.randint(50, (2, 640), device=DEVICE)
    densities = ("surprisal", "conditional_entropy")
    wide, crowded = (information.DensityConfig(densities=densities, bigram_table=size) for size in (2**16, 1))
    exact, clamped = (information.segment_density(tokens, c.init_statistics(2, device=DEVICE), c)[0]
                      for c in (wide, crowded))  # fmt: skip
    assert torch.equal(exact[..., 0], clamped[..., 0])
    assert (clamped[..., 1] <= exact[..., 1]).all() and (clamped[..., 1] > 0).all()


def test_pairs_are_hashed_evenly_and_by_order():
    a, b = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    code = hash_pair(a.flatten(), b.flatten(), 1000)
    assert scipy.stats.chisquare(code.bincount(minlength=1000)).pvalue > 1e-3
    assert (code.view(300, 300) == code.view(300, 300).T).float().mean() < 0.02


def test_gradients_reach_keys_and_logits():
    config, sequences = everything()
    for name in ("keys", "logits"):
        sequences[name].requires_grad_()
    start = config.init_statistics(3, device=DEVICE)
    density, _ = information.segment_density(rows()[0], start, config, **sequences)
    density.sum().backward()
    for name in ("keys", "logits"):
        gradient = sequences[name].grad
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


COMPILED = """
import torch
from hmlab import information
config = information.DensityConfig(densities=tuple(information.DENSITIES), segment=6, horizon=12)
call = {"tokens": torch.randint(9, (2, 42)), "keys": torch.randn(2, 2, 42, 5), "logits": torch.randn(2, 42, 9),
        "statistics": config.init_statistics(2), "config": config}
compiled = torch.compile(information.segment_density, fullgraph=True, backend="eager")(**call)
torch.testing.assert_close(compiled, information.segment_density(**call))
"""


def test_densities_compile_to_one_graph():
    """In a process of its own: the checks of shapes that tests have cannot be traced."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_tokens_change_nothing():
    config, sequences = everything()
    sequences = cut(sequences | {"tokens": rows()[0]}, slice(0, 0))
    start = config.init_statistics(3, device=DEVICE)
    density, end = information.segment_density(statistics=start, config=config, **sequences)
    assert density.shape == (3, 0, len(EVERY_DENSITY))
    assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True))


# Errors


@pytest.mark.unchecked
def test_what_is_wrong_is_named():
    config, sequences = everything()
    start, tokens = config.init_statistics(3, device=DEVICE), rows()[0]
    density = information.segment_density
    other = information.DensityConfig(segment=6, horizon=9).init_statistics(3, device=DEVICE)
    cases = {
        "tokens: expected integers .*multiple of 6": lambda: density(tokens[:, :5], start, config, **sequences),
        "statistics: expected unigrams": lambda: density(tokens, other, config, **sequences),
        "reset: expected bool": lambda: density(tokens, start, config, reset=tokens, **sequences),
        "valid: expected bool": lambda: density(tokens, start, config, valid=tokens[:1] > 0, **sequences),
        "keys: expected .*for spectral, got None": lambda: density(tokens, start, config, logits=sequences["logits"]),
        "logits: expected .*got None": lambda: density(tokens, start, config, keys=sequences["keys"]),
        "keys: expected": lambda: density(tokens, start, config, keys=sequences["keys"][:, 0]),
        "logits: expected": lambda: density(tokens, start, config, logits=sequences["logits"][:, 1:]),
        "densities: expected some of surprisal": lambda: information.DensityConfig(densities=("entropy",)),
        "segment: expected at least 1": lambda: information.DensityConfig(segment=0),
        "concentration: expected more than 0": lambda: information.DensityConfig(concentration=0),
        "horizon: expected at least a segment": lambda: information.DensityConfig(horizon=63),
        "spectral_order: expected 1 or 2": lambda: information.DensityConfig(spectral_order=3),
        "order: expected 1 or 2": lambda: information.spectral_entropy(torch.ones(2, 2), 3),
        "p: expected finite weights": lambda: information.entropy(torch.tensor([1.0, -0.1])),
        "p: expected finite weights .*": lambda: information.entropy(torch.zeros(3)),
        "q: expected finite weights": lambda: information.kl_divergence(torch.ones(2), torch.tensor([math.nan, 1])),
        "q: expected as many outcomes": lambda: information.js_divergence(torch.ones(2), torch.ones(3)),
        "joint: expected at least 2 axes": lambda: information.mutual_information(torch.ones(2)),
        "targets: expected": lambda: information.prediction_bits(torch.ones(2, 3), torch.ones(3)),
        "counts: expected integers": lambda: information.estimate_entropy(torch.ones(3)),
        "counts: expected counts of at least 0": lambda: information.estimate_entropy(torch.tensor([2, -1])),
        "method: expected one of plug-in": lambda: information.estimate_entropy(torch.tensor([2, 1]), "best"),
        "samples: expected": lambda: information.joint_counts(torch.ones(3)),
        "counts: expected integers with a sum": lambda: information.standard_error(
            information.estimate_entropy, torch.tensor([1])),
    }  # fmt: skip
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
