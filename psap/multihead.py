"""A forward() of `torch.nn.MultiheadAttention` that torch.fx can trace and psap can rewrite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


class Traceable(nn.MultiheadAttention):
    """The same module; every size that it fixes is an argument of a call, for `psap.rewriting`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What `torch.nn.MultiheadAttention` computes; shapes as there."""
        batched, causal = query.dim() == 3, is_causal and key_padding_mask is None
        if causal and not need_weights:
            attn_mask = None  # the caller promises that it is the causal one
        q, k, v = (self._heads(x, batched) for x in self._projected(query, key, value))
        if self.bias_k is not None:
            k, v = self._longer(k, self.bias_k), self._longer(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = self._mask(query, attn_mask, key_padding_mask, batched)
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        weights = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            causal = causal and mask is None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
            )
        out = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], self.embed_dim)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self._qkv_same_embed_dim:
            q, k, v = packed(query, key, value, self.in_proj_weight, self.in_proj_bias)
            return [q, k, v]
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self.in_proj_bias is None:
            biases: Any = (None, None, None)
        else:
            biases = self.in_proj_bias.split([self.embed_dim] * 3)
        return [
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """[B, H, L, D] of [L, B, E], [B, L, E] or [L, E]."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _longer(self, x: Tensor, bias: Any) -> Tensor:
        """One more position, [B, H, L + 1, D]."""
        more = bias.view(1, 1, self.num_heads, self.head_dim).transpose(1, 2)
        return torch.cat([x, more.expand(x.shape[0], -1, -1, -1)], 2)

    def _mask(
        self, query: Tensor, mask: Tensor | None, padding: Tensor | None, batched: bool
    ) -> Tensor | None:
        """What to add to the scores, [B or 1, H or 1, L, S]."""
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        if mask is not None:
            mask = F.pad(additive(mask, query), (0, more))
            if mask.dim() == 3:
                mask = mask.view(-1, self.num_heads, mask.shape[1], mask.shape[2])
        if padding is None:
            return mask
        padding = F.pad(additive(padding, query), (0, more))
        padding = padding[:, None, None] if batched else padding[None, None, None]
        return padding if mask is None else mask + padding


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """Minus infinity where a bool mask is True; a float mask as it is."""
    if has_torch_function((mask, like)):
        result: Tensor = handle_torch_function(additive, (mask, like), mask, like)
        return result
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Queries, keys and values by equal parts of the rows of one weight, at once where it can be.

    Args:
        query: [..., E].
        key: [..., E].
        value: [..., E].
        weight: [3 D, E].
        bias: [3 D] or None.

    Returns:
        Three tensors [..., D].
    """
    given = (query, key, value, weight)
    if has_torch_function(given):
        result: tuple[Tensor, ...] = handle_torch_function(
            packed, given, query, key, value, weight, bias
        )
        return result
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        F.linear(x, w, b)
        for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    )
