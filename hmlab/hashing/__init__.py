"""Hash families: short codes that are equal, with a known probability, for what is similar.

    family = hyperplane.Config(dim=64, heads=8, tables=8, bits=12).build()
    codes = family.codes(keys)[..., 0]                       # int32 [batch, slots, heads, tables]
    probed = family.codes(queries, probes=4)                 # int32 [batch, time, heads, tables, probes]
    family.recall(torch.tensor(0.3))                         # P[found] at an angle of 0.3

| family | code of | law is a function of |
|---|---|---|
| `hyperplane` | signs along random directions | angle |
| `learned` | the same, trained | angle, before training |
| `cross_polytope` | nearest vertices of random cross-polytopes | angle |
| `p_stable` | cells on random lines (E2LSH) | distance |
| `minhash` | least elements of a set of token ids | Jaccard similarity |
| `tree` | path through recursive median splits | angle, of isotropic Gaussian vectors |
| `mixture` | components of a Gaussian mixture | overlap of responsibilities |

Every family keeps one interface (`Family`): `codes`, `collision_probability` of one table, `recall` of several.
`Reduced` puts a random projection or PCA before one; `buckets` divides and merges what the codes name by load and
query frequency; `enough_probes` looks only as far as a query's margins require; `recall_curve` measures.
Codes go to `hmlab_kernels.bucket_lookup`, which finds the slots.
"""

from hmlab.hashing import buckets, cross_polytope, hyperplane, learned, minhash, mixture, p_stable, reduction, tree
from hmlab.hashing.curve import recall_curve
from hmlab.hashing.family import Family, Similarity, distinct
from hmlab.hashing.learned import balance, code_churn, decorrelation, retrieval_loss
from hmlab.hashing.probing import NOWHERE, enough_probes, kept
from hmlab.hashing.reduction import PCA, RandomProjection, Reduced

__all__ = [
    "NOWHERE",
    "PCA",
    "Family",
    "RandomProjection",
    "Reduced",
    "Similarity",
    "balance",
    "buckets",
    "code_churn",
    "cross_polytope",
    "decorrelation",
    "distinct",
    "enough_probes",
    "hyperplane",
    "kept",
    "learned",
    "minhash",
    "mixture",
    "p_stable",
    "recall_curve",
    "reduction",
    "retrieval_loss",
    "tree",
]
