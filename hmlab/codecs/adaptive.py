"""The tree of adaptive Huffman coding (algorithm FGK: Faller 1973, Gallager 1978, Knuth 1985)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Node:
    """place: in the order of falling weight. children: none for a leaf. token: of a leaf, None for "not yet seen"."""

    place: int
    weight: int = 0
    parent: _Node | None = None
    children: list[_Node] = field(default_factory=list)
    token: int | None = None


class FGKTree:
    """A Huffman tree of the counts so far. Its nodes stand in an order of falling weight in which siblings are
    neighbours (Gallager's sibling property), which is what makes it one; counting keeps that order by exchanging a node
    with the first of its weight before its weight grows."""

    def __init__(self) -> None:
        root = _Node(0)
        self._order = [root]
        self._leaves: dict[int | None, _Node] = {None: root}
        self._first = {0: 0}  # weight -> place of the first node that has it

    def __contains__(self, token: int) -> bool:
        return token in self._leaves

    def word(self, token: int | None) -> str:
        """The path from the root to a token's leaf, or to that of "not yet seen" (None)."""
        node, steps = self._leaves[token], []
        while node.parent is not None:
            steps.append("01"[node is node.parent.children[1]])
            node = node.parent
        return "".join(reversed(steps))

    def read(self, take: Callable[[], str]) -> int | None:
        """Follow digits from the root to a leaf; its token."""
        node = self._order[0]
        while node.children:
            node = node.children[int(take())]
        return node.token

    def count(self, token: int) -> None:
        """One more of this token."""
        node = self._leaves.get(token) or self._split(token)
        while node is not None:
            node = self._grow(node)

    def _split(self, token: int) -> _Node:
        """"Not yet seen" becomes the parent of a leaf for the token and of itself."""
        parent = self._leaves[None]
        place = len(self._order)
        leaf, unseen = _Node(place, parent=parent, token=token), _Node(place + 1, parent=parent)
        parent.children = [leaf, unseen]
        self._order += [leaf, unseen]
        self._leaves |= {token: leaf, None: unseen}
        return leaf

    def _grow(self, node: _Node) -> _Node | None:
        """Add 1 to a node's weight; the node to grow next."""
        weight, first = node.weight, self._first[node.weight]
        if node.parent is not None and first == node.parent.place:
            # Beside "not yet seen" a node weighs what its parent does and stands right behind it: both grow at once.
            grown = [node.parent, node]
        else:
            self._exchange(node, self._order[first])
            grown = [node]
        for one in grown:
            one.weight += 1
        self._first.setdefault(weight + 1, first)
        following = first + len(grown)
        if following < len(self._order) and self._order[following].weight == weight:
            self._first[weight] = following
        else:
            del self._first[weight]
        return grown[0].parent

    def _exchange(self, a: _Node, b: _Node) -> None:
        """Two subtrees change places."""
        if a is b:
            return
        side_a, side_b = a.parent.children.index(a), b.parent.children.index(b)
        a.parent.children[side_a], b.parent.children[side_b] = b, a
        a.parent, b.parent = b.parent, a.parent
        a.place, b.place = b.place, a.place
        self._order[a.place], self._order[b.place] = a, b
