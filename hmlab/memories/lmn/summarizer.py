"""Summarizers: several child nodes become one, per memory bank, with one weight for all levels."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Mixing = Literal["linear", "depthwise", "full"]


class Summarizer(nn.Module):
    """Maps the children of a node, `[slots, batch, kernel, dim]`, to the node, `[slots', batch, dim]`; whole trees are
    built by `tree_build` from the weights multiplied out.

    linear: `concat(children) W_k + b_k` for each bank k (a convolution grouped by bank; the authors' code).
    depthwise: per channel over the children, then a product over channels (section 3.5). full: a convolution
    that also mixes the banks. depth: further SiLU and linear stages per bank. normalise: RMS norm of the result
    (section 6.1). branch_position: a learned vector added to each child by its place (section 6.2); it matters
    where a stage behind it is not linear. expansion e: a transposed convolution over each child's slots before
    all that, so that nodes of level i have 1 + i·e slots per bank (section 3.7, ExpSum).
    Slots are slot-major, bank-minor; level 0 has one slot that all banks share.
    """

    def __init__(self, dim: int, *, banks: int, kernel: int, expansion: int, mixing: Mixing, depth: int,
                 normalise: bool, branch_position: bool) -> None:
        super().__init__()
        self.banks, self.kernel, self.expansion, self.mixing = banks, kernel, expansion, mixing
        if mixing == "linear":
            # Xavier over the whole tensors, then a tenth, as the authors start them; not bank by bank.
            self.weight = nn.Parameter(0.1 * nn.init.xavier_normal_(torch.empty(banks, kernel * dim, dim)))
            self.bias = nn.Parameter(0.1 * nn.init.xavier_normal_(torch.empty(1, banks, 1, dim)))
        elif mixing == "depthwise":
            self.channel = nn.Parameter(torch.empty(banks, kernel, dim).uniform_(-1, 1) * kernel**-0.5)
            self.weight = nn.Parameter(torch.empty(banks, dim, dim).uniform_(-1, 1) * dim**-0.5)
            self.bias = nn.Parameter(torch.zeros(1, banks, 1, dim))
        else:
            self.weight = nn.Parameter(0.1 * nn.init.xavier_normal_(torch.empty(kernel * banks * dim, banks * dim)))
            self.bias = nn.Parameter(torch.zeros(1, banks, 1, dim))
        self.deeper = nn.ParameterList(
            [torch.empty(banks, dim, dim).uniform_(-1, 1) * dim**-0.5 for _ in range(depth - 1)]
        )
        self.norm = nn.RMSNorm(dim) if normalise else nn.Identity()
        if branch_position:
            self.branch = nn.Parameter(0.02 * torch.randn(kernel, dim))
        if expansion:
            bound = (dim * (1 + expansion)) ** -0.5  # as ConvTranspose1d starts
            self.expander = nn.Parameter(torch.empty(banks, 1 + expansion, dim, dim).uniform_(-bound, bound))
            self.expander_bias = nn.Parameter(torch.empty(banks, dim).uniform_(-bound, bound))

    @property
    def staged(self) -> bool:
        """Whether anything follows the linear part."""
        return len(self.deeper) > 0 or isinstance(self.norm, nn.RMSNorm)

    def multiplied_out(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The weights as `tree_build` takes them: taps, bias, deeper stages, norm."""
        dim, banks = self.bias.shape[-1], self.banks
        if self.mixing == "full":  # [bank, bank read, child, dim, dim]
            weight = self.weight.view(self.kernel, banks, dim, banks, dim).permute(3, 1, 0, 2, 4)
        elif self.mixing == "depthwise":
            weight = (self.channel[..., None] * self.weight[:, None])[:, None]
        else:
            weight = self.weight.view(banks, 1, self.kernel, dim, dim)
        taps, bias, constant = weight[None], self.bias[0, :, 0], None
        if self.expansion:
            grow = self.expander.transpose(0, 1)
            taps = (grow[:, None, :, None] if self.mixing == "full" else grow[:, :, None, None]) @ weight
            constant = self.expander_bias[:, None].expand(-1, self.kernel, -1)
        if hasattr(self, "branch"):
            constant = self.branch.expand(banks, -1, -1) if constant is None else constant + self.branch
        if constant is not None:  # what every child brings along, whatever it holds
            constant = constant.flatten()[None] if self.mixing == "full" else constant.flatten(1)
            bias = bias + (constant[:, None] @ weight.flatten(1, 3)).squeeze(1)
        deeper = torch.stack(list(self.deeper)) if len(self.deeper) else None
        norm = self.norm.weight if isinstance(self.norm, nn.RMSNorm) else None
        return taps.flatten(2, 4), bias, deeper, norm

    def forward(self, children: Float[Tensor, "slots batch kernel dim"]) -> Float[Tensor, "more batch dim"]:
        slots, batch, kernel, dim = children.shape
        shared = slots == 1  # level 0: every bank reads the same slot
        x = children.reshape(1 if shared else slots // self.banks, 1 if shared else self.banks, batch, kernel * dim)
        if self.expansion:
            x = self._expand(x, kernel)
        if hasattr(self, "branch"):
            x = x + self.branch.flatten()
        z = self._mix(x, kernel)  # [slots per bank, banks, batch, dim]
        for weight in self.deeper:
            z = torch.nn.functional.silu(z) @ weight
        return self.norm(z).flatten(0, 1)

    def _mix(self, x: Float[Tensor, "slots some items width"], kernel: int) -> Float[Tensor, "slots banks items dim"]:
        slots, _, items, width = x.shape
        if self.mixing == "linear":
            if slots == 1:  # one product with the bias inside
                bias, weight = self.bias[0].expand(-1, items, -1), self.weight
                return torch.baddbmm(bias, x[0].expand(self.banks, -1, -1), weight)[None]
            return x @ self.weight + self.bias
        x = x.expand(slots, self.banks, items, width)
        split = x.unflatten(-1, (kernel, width // kernel))
        if self.mixing == "depthwise":
            return (split * self.channel[:, None]).sum(-2) @ self.weight + self.bias
        mixed = split.permute(0, 2, 3, 1, 4).flatten(2) @ self.weight  # kernel-major, bank-minor inputs
        return mixed.unflatten(-1, (self.banks, -1)).transpose(1, 2) + self.bias

    def _expand(self, x: Float[Tensor, "slots some items width"], kernel: int
                ) -> Float[Tensor, "more banks items width"]:
        slots, _, items, width = x.shape
        rows = x.expand(slots, self.banks, items, width).unflatten(-1, (kernel, -1)).flatten(2, 3)
        grown = rows.new_zeros(slots + self.expansion, *rows.shape[1:]) + self.expander_bias[:, None]
        for tap in range(1 + self.expansion):
            grown[tap : tap + slots] += rows @ self.expander[:, tap]
        return grown.unflatten(2, (items, kernel)).flatten(3)
