"""The optimizer of a run."""

from typing import Any

import torch
from torch import Tensor, nn

from cifar_ignite.config import OptimizerConfig
from cifar_ignite.training.device import skips_updates
from cifar_ignite.training.muon import Muon


def find_conv_weights(model: nn.Module) -> list[Tensor]:
    """Return the trainable weights of convolutions followed by BatchNorm, recognized by the missing bias."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    weights = (convolution.weight for convolution in convolutions if convolution.bias is None)
    return [weight for weight in weights if weight.requires_grad]


def create_optimizer(
    config: OptimizerConfig, model: nn.Module, amp_dtype: torch.dtype, *, use_cuda_graph: bool = False
) -> torch.optim.SGD:
    """Return SGD with a group of weights and a group of one-dimensional parameters, and a third one of Muon.

    Fused, so that an update can be skipped on the device (see `handlers.attach_grad_clipping`). Where it cannot be, a
    gradient scaler must read from the device whether to skip it, which it does for an optimizer that is not fused.

    Args:
        config: Algorithm and hyperparameters.
        model: Model to optimize.
        amp_dtype: Dtype of the training; Muon computes in bfloat16 if it is bfloat16.
        use_cuda_graph: Whether the update of Muon may be a CUDA graph.
    """
    conv_weights = find_conv_weights(model) if config.name == "muon" else []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trainable if all(parameter is not weight for weight in conv_weights)]
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {
            "params": [parameter for parameter in rest if parameter.ndim <= 1],
            "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0,
        },
    ]
    is_fused = skips_updates(next(model.parameters()).device) or amp_dtype != torch.float16
    options: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "fused": is_fused,
    }
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, **options)
    else:
        dtype = torch.bfloat16 if amp_dtype == torch.bfloat16 else torch.float32
        muon_options = {"lr": config.muon_lr, "momentum": config.muon_momentum}
        optimizer = Muon(
            groups, conv_weights, muon_options=muon_options, dtype=dtype, use_cuda_graph=use_cuda_graph, **options
        )
    _create_momentum_buffers(optimizer)
    return optimizer


def _create_momentum_buffers(optimizer: torch.optim.SGD) -> None:
    """Set all momentum buffers to zero; SGD creates them in its first update, uninitialized if that is skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
