"""Muon, an optimizer for the filters of convolutions, with SGD for everything else."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD


class Muon(SGD):
    """Momentum, orthogonalised, on filters; SGD on all other parameters.

    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon: the filters of a convolution are the rows of a
    matrix (out_channels, in_channels * height * width), and the update is the orthogonal matrix that is nearest to
    their momentum, so that all directions move alike. As in Jordan's CIFAR-10 record, a matrix is kept at a norm of
    sqrt(out_channels), in place of weight decay: BatchNorm follows, which makes the scale of filters meaningless.

    Like torch's fused SGD, it makes no update when its attribute `found_inf`, float (), is not 0, and does not look at
    it on the host.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        filters: list[Tensor],
        *,
        filter_lr: float,
        filter_momentum: float,
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """
        Args:
            groups: of parameters for SGD.
            filters: (out_channels, in_channels, height, width) each.
            filter_lr: how far each of the orthogonal directions moves in an update.
            filter_momentum: in [0, 1), Nesterov's.
            dtype: that matrix products are computed in, float32 or bfloat16.
            options: of SGD.
        """
        last = {"params": filters, "lr": filter_lr, "momentum": filter_momentum, "weight_decay": 0.0}
        super().__init__([*groups, last], fused=True, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients; those of the filters are used up."""
        group = self.param_groups[-1]
        alike = defaultdict(list)
        for filters in group["params"]:
            if filters.grad is not None:
                alike[filters.shape].append(filters)
        for parameters in alike.values():
            self._step_filters(parameters, group["lr"], group["momentum"])
        for filters in group["params"]:
            filters.grad = None  # SGD passes over it
        super().step()

    def _step_filters(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        """Update filters of one shape, in one batch of matrices."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        weight, before = torch.stack(parameters).flatten(2), torch.stack(buffers).flatten(2)
        gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None]).flatten(2)
        buffer = before * momentum + gradient
        update = orthogonalize((gradient + buffer * momentum).to(self.dtype)).to(weight.dtype)
        scale = math.sqrt(weight.shape[1]) / weight.norm(dim=(1, 2), keepdim=True)
        moved = weight * scale - lr * update
        infinite = getattr(self, "found_inf", None)
        if infinite is not None:
            moved, buffer = torch.where(infinite > 0, weight, moved), torch.where(infinite > 0, before, buffer)
        shape = (len(parameters), *parameters[0].shape)
        torch._foreach_copy_(parameters, list(moved.view(shape).unbind()))
        torch._foreach_copy_(buffers, list(buffer.view(shape).unbind()))


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """Nearly the nearest orthogonal matrices: the singular values become about 1 (0.5 to 1.5), the vectors stay.

    A Newton-Schulz iteration with the coefficients of Jordan et al., which rise fastest from near 0.

    Args:
        matrices: float (N, R, C).
        steps: of the iteration.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
