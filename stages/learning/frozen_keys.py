"""InfoNCE against keys that do not learn: exact, for queues of any size, without a matrix of all logits.

With p_ij = softmax_j(a cos(h_i, k_j)) the gradients are known before anyone asks for them:

    dL/dh_i = a/B (sum_j p_ij k_j - k_own(i)),    dL/da = 1/B sum_i h_i (sum_j p_ij k_j - k_own(i)).

So one pass over the keys is enough, a chunk at a time, with running sums that are rescaled where a chunk
has a higher logit (as in online softmax, Milakov and Gimelshein 2018). Vectors are of length 1 here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2048
"""Keys that are looked at together: few enough that they stay in the processor's cache."""


class FrozenInfoNce(torch.autograd.Function):
    """-1/B sum_i log( exp(a cos(h_i, k_own(i))) / sum_j exp(a cos(h_i, k_j)) )."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        anchors: Tensor,
        scale: Tensor,
        vectors: Tensor,
        own: Tensor,
        left_out: Tensor,
        product: torch.dtype,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            ctx: Of autograd.
            anchors: (B, W) h, float32 of length 1; learns.
            scale: a, a scalar; may learn.
            vectors: (C, D) of any type and length; their first W values are the keys.
            own: (B,) where in `vectors` each anchor's own key is. It always counts.
            left_out: (B, C) True where another key does not count.
            product: Type in which anchors and keys are multiplied; sums are float32.
        """
        width = anchors.shape[1]
        own_keys = torch.nn.functional.normalize(vectors[own, :width].float(), dim=1)
        own_logits = scale * (anchors * own_keys).sum(dim=1)
        # The own key stands for itself, unrounded; among the others it is left out.
        left_out = left_out.index_put(
            (torch.arange(len(own), device=own.device), own), left_out.new_ones(())
        )
        highest, total, pulled = own_logits, torch.ones_like(own_logits), own_keys
        queries = (scale * anchors).to(product)
        for some, without in zip(
            torch.split(vectors, CHUNK), torch.split(left_out, CHUNK, dim=1), strict=True
        ):
            keys = some[:, :width].float()
            shrink = keys.norm(dim=1).clamp(min=1e-12).reciprocal()
            keys = keys.to(product)
            logits = ((queries @ keys.T) * shrink).masked_fill_(without, -torch.inf)
            rescale, highest = highest, torch.maximum(highest, logits.amax(dim=1))
            rescale = (rescale - highest).exp()
            shares = (logits - highest[:, None]).exp_()
            total = total * rescale + shares.sum(dim=1)
            pulled = pulled * rescale[:, None] + ((shares * shrink).to(product) @ keys).float()
        ctx.save_for_backward(anchors, scale, (pulled / total[:, None] - own_keys) / len(anchors))
        return (highest + total.log() - own_logits).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's own
        """Gradients of `anchors` and `scale`."""
        anchors, scale, pull = ctx.saved_tensors
        return gradient * scale * pull, gradient * (anchors * pull).sum(), None, None, None, None
