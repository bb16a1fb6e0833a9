"""Muon against PyTorch's own for matrices and against the singular value decomposition, and SGD for the rest."""

import copy

import pytest
import torch
from torch import nn

from cifar_ignite.config import OptimizerConfig
from cifar_ignite.models.registry import create_model
from cifar_ignite.training.muon import Muon, orthogonalize
from cifar_ignite.training.optimizers import create_optimizer, find_conv_weights


def create_muon(conv_weights, others=(), muon_lr=0.1, dtype=torch.bfloat16):
    groups = [{"params": list(others), "weight_decay": 0.01}]
    muon_options = {"lr": muon_lr, "momentum": 0.6}
    return Muon(groups, conv_weights, muon_options=muon_options, dtype=dtype, lr=0.2, momentum=0.9, nesterov=True)


def create_weights(count, *shape):
    """Return parameters drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]


def set_random_gradients(parameters, generator):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalize_keeps_singular_vectors(shape):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s.clamp(min=0.1 * s.max())
    rotated = u.mT @ orthogonalize(u * s[:, None] @ vh) @ vh.mT
    values = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_equals_torch_on_matrices():
    """torch.optim.Muon does not keep a norm, so it is set by hand here."""
    generator = torch.Generator().manual_seed(1)
    weights = create_weights(3, 6, 2, 3, 3)
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    optimizer = create_muon(weights)
    oracle = torch.optim.Muon(matrices, lr=0.1, momentum=0.6, weight_decay=0, ns_steps=3)
    for _ in range(4):
        set_random_gradients(weights, generator)
        for weight, matrix in zip(weights, matrices, strict=True):
            matrix.grad = weight.grad.flatten(1).clone()
            matrix.data *= 6**0.5 / matrix.data.norm()
        optimizer.step()
        oracle.step()
        for weight, matrix in zip(weights, matrices, strict=True):
            assert torch.allclose(weight.flatten(1), matrix, atol=0.01)


def test_muon_in_float32_agrees_with_bfloat16():
    weights, others = create_weights(1, 8, 4, 3, 3), create_weights(1, 8, 4, 3, 3)
    for parameters, dtype in ((weights, torch.bfloat16), (others, torch.float32)):
        set_random_gradients(parameters, torch.Generator().manual_seed(1))
        create_muon(parameters, dtype=dtype).step()
    assert not torch.equal(weights[0], others[0])
    assert torch.allclose(weights[0], others[0], atol=0.01)


def test_muon_updates_all_other_parameters_like_sgd():
    model = create_model("hybrid_resnet", num_classes=10, width=4)
    optimizer = create_optimizer(OptimizerConfig(name="muon", weight_decay=0.1), model, torch.float32)
    conv_weights = {id(weight) for weight in find_conv_weights(model)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in conv_weights]
    expected = copy.deepcopy(others)
    oracle = torch.optim.SGD([{"params": expected, "weight_decay": 0.1}], lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        set_random_gradients(model.parameters(), generator)
        for copied, parameter in zip(expected, others, strict=True):
            copied.grad = parameter.grad.clone()
        optimizer.step()
        oracle.step()
    assert conv_weights
    assert others
    assert all(torch.allclose(parameter, copied) for parameter, copied in zip(others, expected, strict=True))


def test_muon_with_found_inf_skips_update():
    generator = torch.Generator().manual_seed(0)
    weights, other = create_weights(1, 4, 3, 3, 3), nn.Parameter(torch.ones(5))
    optimizer = create_muon(weights, [other])
    set_random_gradients([*weights, other], generator)
    optimizer.step()
    before = copy.deepcopy((weights, other, optimizer.state_dict()["state"]))
    set_random_gradients([*weights, other], generator)
    weights[0].grad[0, 0, 0, 0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weights[0], before[0][0])
    assert torch.equal(other, before[1])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[key]["momentum_buffer"], before[2][key]["momentum_buffer"]) for key in after)
    optimizer.found_inf.zero_()
    set_random_gradients([*weights, other], generator)
    optimizer.step()
    assert not torch.equal(weights[0], before[0][0])


def test_muon_updates_weights_together_as_each_alone():
    """Weights of several shapes, tall and wide, in channels_last and contiguous."""
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (16, 8, 1, 1), (16, 8, 3, 3)]
    together = [create_weights(1, *shape)[0] for shape in shapes]
    together[1].data = together[1].data.contiguous(memory_format=torch.channels_last)
    alone = copy.deepcopy(together)
    optimizers = [create_muon(together, dtype=torch.float32), *(create_muon([w], dtype=torch.float32) for w in alone)]
    for seed in range(3):
        for weights in (together, alone):
            set_random_gradients(weights, torch.Generator().manual_seed(seed))
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(weight, other, atol=1e-6) for weight, other in zip(together, alone, strict=True))


def test_muon_leaves_weights_without_gradient_unchanged():
    weights = create_weights(3, 4, 3, 3, 3)
    before = copy.deepcopy(weights)
    set_random_gradients(weights[1:2], torch.Generator().manual_seed(1))
    create_muon(weights).step()
    assert [torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)] == [True, False, True]


def test_muon_does_not_depend_on_scale_of_gradient():
    weights, others = create_weights(1, 4, 3, 3, 3), create_weights(1, 4, 3, 3, 3)
    first, second = create_muon(weights), create_muon(others, dtype=torch.float32)
    for seed in range(3):
        set_random_gradients(weights, torch.Generator().manual_seed(seed))
        set_random_gradients(others, torch.Generator().manual_seed(seed))
        others[0].grad *= 1000
        first.step()
        second.step()
    assert torch.allclose(weights[0], others[0], atol=0.02)


def test_muon_keeps_norm_of_weights():
    weights = create_weights(1, 4, 3, 3, 3)
    set_random_gradients(weights, torch.Generator().manual_seed(9))
    create_muon(weights, muon_lr=1e-12).step()
    assert weights[0].norm().item() == pytest.approx(2)  # square root of 4 filters
