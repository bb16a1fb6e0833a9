"""Muon against PyTorch's own for matrices, against the singular value decomposition, and SGD beside it."""

import copy

import pytest
import torch
from torch import nn

from cifar_ignite.building import build_model, create_optimizer, find_filters
from cifar_ignite.config import Config, InputError, ModelConfig, OptimizerConfig
from cifar_ignite.models import MODELS, create_model
from cifar_ignite.muon import Muon, orthogonalize

OPTIONS = {"filter_lr": 0.1, "filter_momentum": 0.6, "dtype": torch.bfloat16}


def muon(filters, others=(), lr=0.2, **options):
    groups = [{"params": list(others), "weight_decay": 0.01}]
    return Muon(groups, filters, lr=lr, momentum=0.9, nesterov=True, **(OPTIONS | options))


def give_gradients(parameters, generator):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s.clamp(min=0.1 * s.max())
    found = u.mT @ orthogonalize(u * s[:, None] @ vh) @ vh.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_it_equals_torch_on_matrices():
    """torch.optim.Muon knows no norm that is kept: it is set by hand here."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(6, 2, 3, 3, generator=generator)) for _ in range(3)]
    theirs = [nn.Parameter(parameter.detach().flatten(1)) for parameter in ours]
    optimizer = muon(ours)
    oracle = torch.optim.Muon(theirs, lr=0.1, momentum=0.6, weight_decay=0, ns_steps=3)
    for _ in range(4):
        give_gradients(ours, generator)
        for one, other in zip(ours, theirs, strict=True):
            other.grad = one.grad.flatten(1).clone()
            other.data *= 6**0.5 / other.data.norm()
        optimizer.step()
        oracle.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one.flatten(1), other, atol=0.01)


def test_float32_agrees_with_bfloat16():
    generator = torch.Generator().manual_seed(0)
    one = [nn.Parameter(torch.randn(8, 4, 3, 3, generator=generator))]
    other = copy.deepcopy(one)
    give_gradients(one, generator)
    other[0].grad = one[0].grad.clone()
    muon(one).step()
    muon(other, dtype=torch.float32).step()
    assert not torch.equal(one[0], other[0])
    assert torch.allclose(one[0], other[0], atol=0.01)


def test_everything_else_is_sgd():
    model = create_model("hybrid_resnet", num_classes=10, width=4)
    optimizer = create_optimizer(OptimizerConfig(name="muon", weight_decay=0.1), model, torch.float32)
    filters = {id(one) for one in find_filters(model)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in filters]
    expected = copy.deepcopy(others)
    decays = [{"params": expected, "weight_decay": 0.1}]
    oracle = torch.optim.SGD(decays, lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        give_gradients(model.parameters(), generator)
        for one, other in zip(expected, others, strict=True):
            one.grad = other.grad.clone()
        optimizer.step()
        oracle.step()
    assert filters
    assert others
    assert all(torch.allclose(one, other) for one, other in zip(others, expected, strict=True))


def test_every_parameter_is_in_one_group_and_all_filters_precede_batchnorm():
    model = create_model("se_resnet", num_classes=10, width=4)
    optimizer = create_optimizer(OptimizerConfig(name="muon"), model, torch.float32)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    normed = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(find_filters(model)) == normed


def test_no_update_with_found_inf():
    generator = torch.Generator().manual_seed(0)
    filters, other = [nn.Parameter(torch.randn(4, 3, 3, 3))], nn.Parameter(torch.ones(5))
    optimizer = muon(filters, [other])
    give_gradients([*filters, other], generator)
    optimizer.step()
    before = copy.deepcopy((filters, other, optimizer.state_dict()["state"]))
    give_gradients([*filters, other], generator)
    filters[0].grad[0, 0, 0, 0] = torch.inf
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(filters[0], before[0][0])
    assert torch.equal(other, before[1])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[key]["momentum_buffer"], before[2][key]["momentum_buffer"]) for key in after)
    optimizer.found_inf.zero_()
    give_gradients([*filters, other], generator)
    optimizer.step()
    assert not torch.equal(filters[0], before[0][0])


def test_filters_without_a_gradient_stay():
    generator = torch.Generator().manual_seed(0)
    filters = [nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator)) for _ in range(3)]
    before = copy.deepcopy(filters)
    give_gradients(filters[1:2], generator)
    muon(filters).step()
    assert [torch.equal(one, other) for one, other in zip(filters, before, strict=True)] == [True, False, True]


def test_a_model_without_filters_is_refused(monkeypatch):
    def flat_net(*, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))

    monkeypatch.setitem(MODELS, "flat_net", flat_net)
    config = Config(model=ModelConfig(name="flat_net"), optimizer=OptimizerConfig(name="muon"))
    with pytest.raises(InputError, match=r"^optimizer.name: flat_net has no convolution without a bias"):
        build_model(config, torch.device("cpu"))


def test_a_norm_is_kept_and_the_gradients_scale_does_not_matter():
    one = [nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))]
    other = copy.deepcopy(one)
    first, second = muon(one), muon(other, dtype=torch.float32)
    for seed in range(3):
        give_gradients(one, torch.Generator().manual_seed(seed))
        give_gradients(other, torch.Generator().manual_seed(seed))
        other[0].grad *= 1000
        first.step()
        second.step()
    assert torch.allclose(one[0], other[0], atol=0.02)
    still = muon(one, filter_lr=1e-12)
    give_gradients(one, torch.Generator().manual_seed(9))
    still.step()
    assert one[0].norm().item() == pytest.approx(2)  # sqrt of 4 filters
