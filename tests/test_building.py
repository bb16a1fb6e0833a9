"""The whitened stem: what it computes, that it stays, and which models it is refused for."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import the_run
from torch import nn

from cifar_ignite.augment import normalize, to_float
from cifar_ignite.building import build_model, create_loaders, create_optimizer, whiten_stem
from cifar_ignite.checkpoints import load_checkpoint
from cifar_ignite.config import AugmentConfig, InputError
from cifar_ignite.data import load_images, split_images
from cifar_ignite.train import train

CPU = torch.device("cpu")


def natural_images(count):
    """uint8 (N, 3, 16, 16) whose neighbouring pixels and channels are alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 4, 4, generator=generator) + 0.3 * torch.rand(count, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, scale_factor=4, mode="bilinear") + 0.05 * torch.rand(
        count, 3, 16, 16, generator=generator
    )
    return (smooth * 180).byte()


@pytest.mark.parametrize("filters", [1, 9, 54])
def test_outputs_of_a_whitened_stem_are_uncorrelated_but_for_negatives(filters):
    model = nn.Sequential(nn.Conv2d(3, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters))
    images, config = natural_images(500), AugmentConfig()
    whiten_stem(model, images, config)
    seen = normalize(to_float(images), config.mean, config.std).double()
    outputs = F.conv2d(seen, model[0].weight.double()).transpose(0, 1).flatten(1)
    half = (filters + 1) // 2
    assert torch.equal(outputs[half:], -outputs[: filters - half])
    moments = outputs[:half] @ outputs[:half].T / outputs.shape[1]
    power = moments.diagonal()
    assert (moments - torch.diag(power)).abs().max() < 1e-4 * power.max()
    # The directions of most variance come first, and no direction has more than the first.
    assert (power.diff() < 1e-6 * power.max()).all()
    patches = F.unfold(seen, 3).transpose(0, 1).flatten(1)
    assert power[0] == pytest.approx(torch.linalg.matrix_norm(patches, 2).item() ** 2 / outputs.shape[1], rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_whitened_stem_stays_while_all_else_is_trained(tiny_config, tmp_path, name):
    config = tiny_config(train={"whiten_stem": True}, optimizer={"name": name, "lr": 0.1, "weight_decay": 0.1})
    model = build_model(config, CPU)
    loader, _ = create_loaders(config, split_images(config.data, load_images(config.data, train=True)), CPU)
    drawn = model.stem[0].weight.detach().clone()
    whiten_stem(model, loader.images, config.augment)
    stem = model.stem[0].weight
    assert not torch.equal(stem, drawn)
    optimizer = create_optimizer(config.optimizer, model, torch.float32)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in model.parameters()} - {id(stem)}

    train(config)
    trained = load_checkpoint(next((the_run(tmp_path) / "checkpoints").glob("latest_*8.pt")))["model"]
    for key, before in model.state_dict().items():
        assert torch.equal(trained[key], before) == (key == "stem.0.weight"), key


def test_models_without_a_stem_to_whiten_are_refused_and_nothing_is_written(tiny_config, tmp_path):
    with pytest.raises(InputError, match=r"train\.whiten_stem: .* set it to false"):
        whiten_stem(nn.Sequential(nn.Linear(4, 4)), natural_images(4), AugmentConfig())
    # 3x3 patches of three channels have 27 principal components.
    with pytest.raises(InputError, match=r"train\.whiten_stem"):
        train(tiny_config(train={"whiten_stem": True}, model={"width": 55}))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_an_update_after_one_that_was_skipped_is_a_first_one(tiny_config, name):
    """torch's SGD makes its momenta at the first update, and leaves them as the memory was if that is skipped."""
    config = tiny_config(optimizer={"name": name, "momentum": 0.9})
    results = []
    for skipped in (0, 1):
        model = build_model(config, torch.device("cpu"))
        optimizer = create_optimizer(config.optimizer, model, torch.float32)
        for infinite in [1.0] * skipped + [0.0]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if infinite else 0.1)
            optimizer.found_inf = torch.tensor(infinite)
            optimizer.step()
        results.append(list(model.parameters()))
        assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.state.values())
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
