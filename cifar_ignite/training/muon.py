"""Muon, an optimizer for convolution weights, with SGD for all other parameters."""

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from cifar_ignite.augment.elementwise import constant
from cifar_ignite.cuda_graphs import TensorFunction, record_cuda_graph


class Muon(SGD):
    """Orthogonalized momentum for convolution weights, SGD for all other parameters.

    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon: the filters of a convolution are the rows of a
    matrix (out_channels, in_channels * height * width), and the update is the orthogonal matrix closest to their
    momentum. As in Jordan's CIFAR-10 record, the matrix is kept at a norm of sqrt(out_channels) instead of weight
    decay: BatchNorm follows, which makes the scale of the filters irrelevant.

    Like torch's fused SGD, it skips the update on the device if its attribute `found_inf`, float (), is not 0.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        conv_weights: list[Tensor],
        *,
        muon_options: dict[str, Any],
        dtype: torch.dtype,
        use_cuda_graph: bool = False,
        **sgd_options: Any,
    ) -> None:
        """
        Args:
            groups: Parameter groups of SGD.
            conv_weights: Parameters of Muon, (out_channels, in_channels, height, width) each.
            muon_options: "lr", the step along each orthogonal direction, and "momentum", Nesterov's, in [0, 1).
            dtype: Dtype of the matrix products, float32 or bfloat16.
            use_cuda_graph: Whether the update of the convolution weights is recorded, see `record_cuda_graph`.
            sgd_options: Options of SGD, which is fused unless they differ.
        """
        muon_group = {"params": conv_weights, "weight_decay": 0.0, **muon_options}
        super().__init__([*groups, muon_group], **({"fused": True} | sgd_options))
        self.dtype, self.use_cuda_graph = dtype, use_cuda_graph
        self._graphs: dict[tuple[float, ...], TensorFunction] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients, and delete the gradients of the convolution weights."""
        group = self.param_groups[-1]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if weights:
            grad = _concatenate([weight.grad for weight in weights if weight.grad is not None])
            lr = torch.full((), group["lr"], device=grad.device)
            found_inf = getattr(self, "found_inf", None)
            found_inf = torch.zeros_like(lr) if found_inf is None else found_inf
            self._muon_update(weights)(grad, lr, found_inf)
        for weight in weights:
            weight.grad = None  # SGD skips it
        super().step()

    def _muon_update(self, weights: list[Tensor]) -> TensorFunction:
        """Return `_update_weights` of these weights, recorded if requested; again if they or their momentum moved."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        update = partial(self._update_weights, weights, buffers)
        if not self.use_cuda_graph:
            return update
        key = (self.param_groups[-1]["momentum"], *(tensor.data_ptr() for tensor in (*weights, *buffers)))
        if key not in self._graphs:
            grad, one = _concatenate(weights), torch.ones((), device=weights[0].device)
            # The recording calls the function, which then skips the update.
            self._graphs = {key: record_cuda_graph(update, grad, one, one)}  # what moved does not come back
        return self._graphs[key]

    def _update_weights(
        self, weights: list[Tensor], buffers: list[Tensor], grad: Tensor, lr: Tensor, found_inf: Tensor
    ) -> Tensor:
        """Update convolution weights as one vector: on a GPU, kernel launches take longer than the arithmetic.

        Args:
            weights: Weights (out_channels, in_channels, height, width), changed in place.
            buffers: Their momentum, changed in place.
            grad: Their concatenated gradients.
            lr: Learning rate, float ().
            found_inf: Float (); nothing changes unless it is 0.

        Returns:
            Bool (), whether the update was skipped.
        """
        momentum = self.param_groups[-1]["momentum"]
        old_weight, old_buffer = _concatenate(weights), _concatenate(buffers)
        buffer = torch.add(grad, old_buffer, alpha=momentum)
        direction = torch.add(grad, buffer, alpha=momentum).to(self.dtype)
        update = _concatenate(orthogonalize_all(_split(direction, weights))).to(old_weight.dtype)
        new_weight = _norm_scale(old_weight, weights).mul_(old_weight).sub_(update.mul_(lr))
        is_skipped = found_inf > 0
        # torch has no public operators over a list of tensors (checked with torch 2.11 and 2.14).
        torch._foreach_copy_(weights, _split(torch.where(is_skipped, old_weight, new_weight), weights))
        torch._foreach_copy_(buffers, _split(torch.where(is_skipped, old_buffer, buffer), buffers))
        return is_skipped


def _concatenate(weights: list[Tensor]) -> Tensor:
    """Return the elements of weights (out_channels, in_channels, height, width) as one vector.

    The order of each weight's elements is that of channels_last, so that no copy precedes the concatenation.
    """
    return torch.cat([weight.permute(0, 2, 3, 1).flatten() for weight in weights])


def _split(vector: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return views of a vector in the shapes of the weights: the inverse of `_concatenate`."""
    parts = vector.split([weight.numel() for weight in weights])
    return [
        part.view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        for part, weight in zip(parts, weights, strict=True)
    ]


def _norm_scale(vector: Tensor, weights: list[Tensor]) -> Tensor:
    """Return sqrt(out_channels) / norm of each weight, repeated for each of its elements.

    Args:
        vector: Concatenated elements of the weights.
        weights: Weights (out_channels, in_channels, height, width), for their sizes.
    """
    sizes = [weight.numel() for weight in weights]
    # torch has no public operators over a list of tensors (checked with torch 2.11 and 2.14).
    norms = torch.stack(torch._foreach_norm(vector.split(sizes)))
    scales = constant(tuple(math.sqrt(len(weight)) for weight in weights), vector.device) / norms
    return torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])


def orthogonalize_all(weights: list[Tensor]) -> list[Tensor]:
    """Return `orthogonalize` of the filters of each weight; filter matrices of one shape form one batch.

    Args:
        weights: Float (out_channels, in_channels, height, width) in channels_last.

    Returns:
        Tensors of the same shapes.
    """
    by_shape = defaultdict(list)
    for index, weight in enumerate(weights):
        by_shape[len(weight), weight[0].numel()].append(index)
    results = list(weights)
    for indices in by_shape.values():
        batch = torch.stack([weights[index].permute(0, 2, 3, 1).flatten(1) for index in indices])
        for index, result in zip(indices, orthogonalize(batch), strict=True):
            results[index] = result.reshape(weights[index].permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return results


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """Return approximately the closest orthogonal matrices: same singular vectors, singular values between 0.5 and 1.5.

    A Newton-Schulz iteration with the coefficients of Jordan et al., which rise fastest near 0.

    Args:
        matrices: Float (N, R, C).
        steps: Number of iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
