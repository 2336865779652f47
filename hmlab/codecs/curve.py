"""Rate against distortion, of any codecs at any of their sizes, with the Gaussian bound beside it.

Source: Cover and Thomas 2006, Elements of Information Theory, 10.3: no code of independent Gaussian vectors whose
covariance has the eigenvalues λ_i reaches, at R bits a vector, a mean squared error below

    D(R) = Σ_i min(θ, λ_i),   R = Σ_i max(0, ½ log2(λ_i / θ))        (reverse water-filling)

which is σ² 2^(-2R) for a single λ = σ². Units: bits a token, over all its heads; distortions are shares of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hmlab.codecs.codec import Codec, Distortion, Queries, Segments, bits, check_segments


def gaussian_bound(eigenvalues: Float[np.ndarray, "channels"], rate: Float[np.ndarray, "*rates"]
                   ) -> Float[np.ndarray, "*rates"]:
    """D(R) of independent Gaussian vectors: least squared error, summed over channels, at `rate` bits a vector.

    Raises ValueError by argument: eigenvalues or rates below 0.
    """
    if eigenvalues.ndim != 1 or not (eigenvalues >= 0).all():
        raise ValueError(f"eigenvalues: expected a vector of numbers from 0, got {eigenvalues}")
    if not (rate >= 0).all():
        raise ValueError(f"rate: expected at least 0 bits, got {rate.min()}")
    variance = np.sort(eigenvalues[eigenvalues > 0].astype(np.float64))[::-1]
    if not variance.size:
        return np.zeros_like(rate, dtype=np.float64)
    # With the n greatest above the water, its level follows; the right n is the last that leaves all n above it.
    count = np.arange(1, len(variance) + 1)
    log_level = (np.log2(variance).cumsum() - 2 * np.asarray(rate, np.float64)[..., None]) / count
    above = (log_level <= np.log2(variance)).cumprod(-1).sum(-1).astype(np.int64)
    level = np.exp2(np.take_along_axis(log_level, above[..., None] - 1, -1))
    return np.asarray(np.minimum(level, variance).sum(-1))


def rate_distortion(
    codecs: Mapping[str, tuple[Codec, Sequence[int | None]]], k: Segments, v: Segments, q: Queries | None = None
) -> xr.Dataset:
    """Code k and v with each codec at each of its numbers of slots, and measure.

    codecs: name to codec and its numbers of slots (None: as many as there can be). q: probe queries, as
    `Codec.distortion` takes them.

    Returns a Dataset over `codec` and `slots` (0 stands for None; NaN where a codec was not asked):

        rate                                   bits a token, of codes as they are held, all heads together
        keys, values, attention, mass          see `Distortion`
        reconstruction                         mean of `keys` and `values`
        bound                                  least `reconstruction` at that rate of independent Gaussian tokens with
                                               the covariance of these. Text is neither and may be below, and so are
                                               floats kept as they are, for the bound is of real numbers
        shared                                 bits that a codec learned or was fitted to, not in the rate; by codec

    Raises ValueError by argument: no codecs, a codec without sizes, keys or values that do not vary.
    """
    if not codecs or not all(len(sizes) for _, sizes in codecs.values()):
        raise ValueError("codecs: expected at least one codec, each with at least one number of slots")
    check_segments(k, v)
    eigenvalues = _eigenvalues(k, v)
    names, slots = list(codecs), sorted({size or 0 for _, sizes in codecs.values() for size in sizes})
    shape = (len(names), len(slots))
    data = {name: np.full(shape, np.nan) for name in ("rate", *Distortion._fields)}
    tokens = k.shape[0] * k.shape[1] * k.shape[2]
    for row, (codec, sizes) in enumerate(codecs.values()):
        for size in sizes:
            place = row, slots.index(size or 0)
            with torch.no_grad():
                code = codec.encode(k, v, size)
                data["rate"][place] = bits(code) / tokens
                for name, value in codec.distortion(k, v, code, q)._asdict().items():
                    data[name][place] = float(value)
    data["reconstruction"] = (data["keys"] + data["values"]) / 2
    asked = ~np.isnan(data["rate"])
    data["bound"] = np.full(shape, np.nan)
    data["bound"][asked] = gaussian_bound(eigenvalues, data["rate"][asked])
    variables = {name: (("codec", "slots"), values) for name, values in data.items()}
    variables["shared"] = "codec", [bits(tuple(codec.parameters())) for codec, _ in codecs.values()]
    curve = xr.Dataset(variables, {"codec": names, "slots": slots})
    curve["rate"].attrs["units"] = "bits/token"
    curve["shared"].attrs["units"] = "bits"
    return curve


def _eigenvalues(k: Segments, v: Segments) -> Float[np.ndarray, "channels"]:
    """Of the covariance of (keys, values) of all heads, keys and values scaled to a variance of one half each."""
    parts = []
    for name, x in (("k", k), ("v", v)):
        x = x.detach().double().flatten(3).flatten(0, 2)
        x = x - x.mean(0)
        total = x.square().mean(0).sum()
        if not total > 0:
            raise ValueError(f"{name}: expected tokens that vary, got variance {float(total)}")
        parts.append(x * (2 * total) ** -0.5)
    x: Tensor = torch.cat(parts, 1)
    return torch.linalg.eigvalsh(x.mT @ x / len(x)).clamp(min=0).cpu().numpy()
