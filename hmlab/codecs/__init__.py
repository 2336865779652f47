"""Codecs: of segments of keys and values, with loss, and of token sequences, without.

    codec = Chain.Config(stages=(MeanPool.Config(), Quantisation.Config(bits=8))).build()
    code = codec.encode(k, v, slots=4)
    codec.decode(code)                      # k̂, v̂, mass, position: slots to attend to
    bits(code), codec.distortion(k, v, code)

    rate_distortion({"mean": (codec, (1, 4, 16))}, k, v)        # an xarray.Dataset

`CODECS` and `TOKEN_CODECS` name them. `codec` says what each of them does, `lossless` what those of tokens do.
"""

from hmlab.codecs.chain import Chain
from hmlab.codecs.codec import Code, Codec, Distortion, Identity, bits
from hmlab.codecs.curve import gaussian_bound, rate_distortion
from hmlab.codecs.landmarks import Landmarks
from hmlab.codecs.lossless import (
    LZW,
    TOKEN_CODECS,
    AdaptiveHuffman,
    Encoded,
    Huffman,
    RunLength,
    TokenCodec,
    bits_per_token,
)
from hmlab.codecs.pruning import HeadPruning, TokenPruning
from hmlab.codecs.quantisation import Quantisation
from hmlab.codecs.slots import KMeans, LearnedSlots, MeanPool, StridedConvolution
from hmlab.codecs.vectors import PCA, SparseDictionary, TruncatedSVD

CODECS: dict[str, type[Codec]] = {
    "identity": Identity,
    "learned-slots": LearnedSlots,
    "mean-pool": MeanPool,
    "strided-convolution": StridedConvolution,
    "k-means": KMeans,
    "landmarks": Landmarks,
    "token-pruning": TokenPruning,
    "head-pruning": HeadPruning,
    "truncated-svd": TruncatedSVD,
    "pca": PCA,
    "sparse-dictionary": SparseDictionary,
    "quantisation": Quantisation,
    "chain": Chain,
}

__all__ = [
    "CODECS",
    "LZW",
    "PCA",
    "TOKEN_CODECS",
    "AdaptiveHuffman",
    "Chain",
    "Code",
    "Codec",
    "Distortion",
    "Encoded",
    "HeadPruning",
    "Huffman",
    "Identity",
    "KMeans",
    "Landmarks",
    "LearnedSlots",
    "MeanPool",
    "Quantisation",
    "RunLength",
    "SparseDictionary",
    "StridedConvolution",
    "TokenCodec",
    "TokenPruning",
    "TruncatedSVD",
    "bits",
    "bits_per_token",
    "gaussian_bound",
    "rate_distortion",
]
