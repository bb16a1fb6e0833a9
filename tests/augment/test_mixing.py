"""CutMix and MixUp: images and targets are mixed by the same weights."""

import torch

from cifar_ignite.augment.mixing import cutmix_or_mixup
from cifar_ignite.config import AugmentConfig
from tests.augment.oracle import SIZE


def filled_with_labels(size):
    """Ten images filled with their label, so that pasted areas and weights can be read from the pixels."""
    labels = torch.arange(10)
    return labels.float()[:, None, None, None].expand(10, 3, size, size).clone(), labels


def test_cutmix_mixes_targets_by_pasted_area():
    images, labels = filled_with_labels(SIZE)
    config = AugmentConfig(cutmix_p=1.0)
    fractions = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, targets = cutmix_or_mixup(images, labels, config, 10)
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
    mixed, targets = cutmix_or_mixup(images, labels, AugmentConfig(cutmix_p=0, mixup_p=1.0, mixup_alpha=1.0), 10)
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(10.0), atol=1e-5)
    assert (targets.max(1).values < 1).all()


def test_cutmix_or_mixup_leaves_remaining_batches_unmixed():
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    config = AugmentConfig(cutmix_p=0.5, mixup_p=0.3)
    torch.manual_seed(0)
    unmixed = sum(cutmix_or_mixup(images, labels, config, 10)[1].max() == 1 for _ in range(2000))
    # CutMix of 4x4 pixels sometimes pastes nothing or everything, so slightly more than 20% are unmixed.
    assert 0.2 < unmixed / 2000 < 0.5
