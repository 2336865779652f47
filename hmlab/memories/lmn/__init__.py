"""Logarithmic Memory Network: a tree of summaries, of which every position reads one node per level.

Source: Taha, Logarithmic Memory Networks (arXiv 2501.07905), sections 3.2 to 3.7, 6.1 and 6.2; initialisation and
parameter layout as in the authors' published code.

    n_{i,j} = summarise(n_{i-1, a·j}, …, n_{i-1, a·j+a-1}),   n_{0,t} = x_t          (tree, a = arity)
    s_n = q_n · k_t / sqrt(D),   y_t = W_o Σ_n softmax(s)_n v_n + b_o                (single-vector attention)

over n in {own token} ∪ {last node of level i that ends at or before t, every bank, i = 1 .. floor(log_a t)}.

Symbols: B batch, L time, E dim, H heads, D = E / H head dim, K banks, t position (1-based), i level. Position is
told by the path through the tree alone: a token's weight in a node is the product of the child factors on its way.

Forward and step are one function: the state holds the last token and the last node of each level and bank,
1 + K·floor(log2 t) vectors of E numbers (an arity or kernel above 2 keeps kernel − 1 per level; ExpSum 1 + i·e
slots per node), and the position.

Where this departs from the paper: scores are divided by sqrt(D), as the authors' code does, not sqrt(E), as the
text says; nodes not yet there are masked by position, where the code masks vectors that are exactly zero.
"""

from .authors import load_authors_state
from .network import Config, LogarithmicMemory, State

__all__ = ["Config", "LogarithmicMemory", "State", "load_authors_state"]
