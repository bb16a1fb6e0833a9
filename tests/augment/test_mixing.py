"""CutMix and MixUp: images and targets are mixed by the same weights."""

import torch
from torchvision.transforms import v2

from cifar_ignite.augment.mixing import create_cutmix_or_mixup
from cifar_ignite.config import AugmentConfig
from tests.augment.oracle import SIZE


def filled_with_labels(size):
    """Ten images filled with their label, so that pasted areas and weights can be read from the pixels."""
    labels = torch.arange(10)
    return labels.float()[:, None, None, None].expand(10, 3, size, size).clone(), labels


def test_cutmix_mixes_targets_by_pasted_area():
    images, labels = filled_with_labels(SIZE)
    mix = create_cutmix_or_mixup(AugmentConfig(cutmix_p=1.0), 10)
    fractions = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
        pasted = (mixed[:, 0] != labels[:, None, None]).float().mean((1, 2))
        partner = labels.roll(1)
        assert torch.allclose(targets.gather(1, partner[:, None])[:, 0], pasted, atol=1e-6)
        assert torch.allclose(targets.gather(1, labels[:, None])[:, 0], 1 - pasted, atol=1e-6)
        fractions.append(pasted[0].item())
    assert min(fractions) < 0.2
    assert max(fractions) > 0.5


def test_mixup_blends_images_and_targets_alike():
    images, labels = filled_with_labels(4)
    torch.manual_seed(0)
    config = AugmentConfig(cutmix_p=0, mixup_p=1.0, mixup_alpha=1.0)
    mixed, targets = create_cutmix_or_mixup(config, 10)(images, labels)
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(10.0), atol=1e-5)
    assert (targets.max(1).values < 1).all()


def test_cutmix_or_mixup_leaves_remaining_batches_unmixed():
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    mix = create_cutmix_or_mixup(AugmentConfig(cutmix_p=0.5, mixup_p=0.3), 10)
    torch.manual_seed(0)
    unmixed = sum(mix(images, labels)[1].max() == 1 for _ in range(2000))
    # CutMix of 4x4 pixels sometimes pastes nothing or everything, so slightly more than 20% are unmixed.
    assert 0.2 < unmixed / 2000 < 0.5


def test_cutmix_and_mixup_are_created_once(monkeypatch):
    created = []
    for name in ("CutMix", "MixUp"):
        create = getattr(v2, name)
        monkeypatch.setattr(
            v2, name, lambda name=name, create=create, **options: created.append(name) or create(**options)
        )
    mix = create_cutmix_or_mixup(AugmentConfig(cutmix_p=0.5, mixup_p=0.5), 10)
    for _ in range(4):
        mix(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    assert created == ["CutMix", "MixUp"]
