"""InfoNCE against keys that do not learn: exact, for queues of any size, without a matrix of all logits.

With p_ij = softmax_j(a cos(h_i, k_j)) the gradients are known before anyone asks for them:

    dL/dh_i = a/B (sum_j p_ij k_j - k_own(i)),    dL/da = 1/B sum_i h_i (sum_j p_ij k_j - k_own(i)).

So one pass over the keys is enough, a chunk at a time, with running sums that are rescaled where a chunk
has a higher logit (as in online softmax, Milakov and Gimelshein 2018). Vectors are of length 1 here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FrozenInfoNce(torch.autograd.Function):
    """-1/B sum_i log( exp(a cos(h_i, k_own(i))) / sum_j exp(a cos(h_i, k_j)) )."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        anchors: Tensor,
        scale: Tensor,
        own_keys: Tensor,
        not_negative: Tensor,
        chunks: Iterable[Tensor],
    ) -> Tensor:
        """Returns the scalar loss.

        Args:
            ctx: The context of autograd.
            anchors: (B, W) float32 h of unit length; has a gradient.
            scale: Scalar a; may have a gradient.
            own_keys: (B, W) float32 positives k_own of unit length, always in the denominator.
            not_negative: (B, C) mask of keys outside the denominator; must include each anchor's positive.
            chunks: (n, W) of the C keys in turn, of length 1, in the type in which they are multiplied;
                sums are float32.
        """
        # The own key stands for itself, unrounded.
        own_logits = scale * (anchors * own_keys).sum(dim=1)
        highest, total, pulled = own_logits, torch.ones_like(own_logits), own_keys
        queries, first = scale * anchors, 0
        for keys in chunks:
            masked = not_negative[:, first : first + len(keys)]
            first += len(keys)
            logits = (queries.to(keys.dtype) @ keys.T).float().masked_fill_(masked, -torch.inf)
            rescale, highest = highest, torch.maximum(highest, logits.amax(dim=1))
            rescale = (rescale - highest).exp()
            shares = logits.sub_(highest[:, None]).exp_()
            total = total * rescale + shares.sum(dim=1)
            pulled = pulled * rescale[:, None] + (shares.to(keys.dtype) @ keys).float()
        ctx.save_for_backward(anchors, scale, (pulled / total[:, None] - own_keys) / len(anchors))
        return (highest + total.log() - own_logits).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's own
        """Returns the gradients of `anchors` and `scale`."""
        anchors, scale, pull = ctx.saved_tensors
        return gradient * scale * pull, gradient * (anchors * pull).sum(), None, None, None
