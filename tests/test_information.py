"""Information measures against closed forms and scipy, estimators against their exact bias, densities against a plain
token-by-token account; streaming, causality, documents and padding."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hmlab import information
from hmlab.information.statistics import hash_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_DENSITIES = ("surprisal", "conditional_entropy", "mutual_information", "kl", "js")
EVERY_DENSITY = tuple(information.DENSITIES)
each_density = pytest.mark.parametrize("name", EVERY_DENSITY)
each_method = pytest.mark.parametrize("method", list(information.ESTIMATORS))
each_horizon = pytest.mark.parametrize("horizon", [None, 8, 20])


def tensor(*values):
    return torch.tensor(*values, dtype=torch.float64, device=DEVICE)


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
