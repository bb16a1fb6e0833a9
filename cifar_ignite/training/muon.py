"""Muon, an optimizer for convolution weights, with SGD for all other parameters."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD


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
        **sgd_options: Any,
    ) -> None:
        """
        Args:
            groups: Parameter groups of SGD.
            conv_weights: Parameters of Muon, (out_channels, in_channels, height, width) each.
            muon_options: "lr", the step along each orthogonal direction, and "momentum", Nesterov's, in [0, 1).
            dtype: Dtype of the matrix products, float32 or bfloat16.
            sgd_options: Options of SGD.
        """
        muon_group = {"params": conv_weights, "weight_decay": 0.0, **muon_options}
        super().__init__([*groups, muon_group], fused=True, **sgd_options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients, and delete the gradients of the convolution weights."""
        group = self.param_groups[-1]
        by_shape = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[weight.shape].append(weight)
        for weights in by_shape.values():
            self._step_muon(weights, group["lr"], group["momentum"])
        for weight in group["params"]:
            weight.grad = None  # SGD skips it
        super().step()

    def _step_muon(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        """Update parameters of one shape as one batch of matrices."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        weight, old_buffer = torch.stack(parameters).flatten(2), torch.stack(buffers).flatten(2)
        grad = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None]).flatten(2)
        buffer = old_buffer * momentum + grad
        update = orthogonalize((grad + buffer * momentum).to(self.dtype)).to(weight.dtype)
        scale = math.sqrt(weight.shape[1]) / weight.norm(dim=(1, 2), keepdim=True)
        new_weight = weight * scale - lr * update
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            new_weight = torch.where(found_inf > 0, weight, new_weight)
            buffer = torch.where(found_inf > 0, old_buffer, buffer)
        _copy_all(parameters, new_weight)
        _copy_all(buffers, buffer)


def _copy_all(targets: list[Tensor], matrices: Tensor) -> None:
    """Copy matrices (N, out_channels, ...) to N tensors in one kernel launch.

    torch has no public operator over a list of tensors (checked with torch 2.11 and 2.14).
    """
    torch._foreach_copy_(targets, list(matrices.view(len(targets), *targets[0].shape).unbind()))


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
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
