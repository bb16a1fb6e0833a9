"""The pipeline: which operations it applies, in which order and strength, and when."""

import itertools

import pytest
import torch
from torchvision.transforms import v2

from cifar_ignite.augment import color, pipeline
from cifar_ignite.augment.elementwise import normalize
from cifar_ignite.augment.geometry import flip
from cifar_ignite.augment.pipeline import create_pipeline, create_train_transform
from cifar_ignite.config import STRONG_AUGMENT_OFF, AugmentConfig
from tests.augment.oracle import SIZE

OFF = {
    "flip_p": 0,
    "rotation_degrees": 0,
    "perspective_p": 0,
    "brightness": 0,
    "contrast": 0,
    "saturation": 0,
    "hue": 0,
    "erasing_p": 0,
    "cutmix_p": 0,
}


def batch(count=64, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8), torch.arange(count) % 10


def no_flip(images):
    return torch.zeros(len(images), dtype=torch.bool)


def test_pipeline_with_everything_off_normalizes_only():
    config = AugmentConfig(**OFF)
    images, labels = batch()
    augmented, targets = create_pipeline(config, 10)(images, labels, ~labels.bool())
    assert torch.allclose(augmented, normalize(images / 255, config.mean, config.std), atol=1e-6)
    assert torch.equal(targets.argmax(1), labels)
    assert torch.equal(targets.sum(1), torch.ones(64))


@pytest.mark.parametrize(
    "on",
    [
        {"flip_p": 0.5},
        {"crop_padding": 4},
        {"rotation_degrees": 15},
        {"perspective_p": 0.9},
        {"brightness": 0.3},
        {"contrast": 0.3},
        {"saturation": 0.3},
        {"hue": 0.1},
        {"erasing_p": 0.9},
        {"cutout_size": 8},
        {"flip_mode": "alternating"},
        {"trivial_augment": "wide"},
    ],
    ids=lambda on: next(iter(on)),
)
def test_pipeline_draws_separate_parameters_for_every_image(on):
    """The same image repeated 64 times has more than one result."""
    images, labels = batch(1)
    augmented, _ = create_pipeline(AugmentConfig(**(OFF | on)), 10)(
        images.repeat(64, 1, 1, 1), labels.repeat(64), torch.arange(64) % 2 == 0
    )
    assert len(augmented.flatten(1).unique(dim=0)) > 1


class Recorder:
    """Records the arguments and results of the functions that the pipeline calls, in the order of the calls."""

    def __init__(self, monkeypatch, names):
        self.calls = []
        for name in names:
            module = color if name.startswith("adjust_") else pipeline
            monkeypatch.setattr(module, name, self.wrap(name, getattr(module, name)))

    def wrap(self, name, function):
        def call(*arguments):
            result = function(*arguments)
            self.calls.append((name, arguments, result))
            return result

        return call

    def arguments(self, name, position):
        return torch.cat([arguments[position] for called, arguments, _ in self.calls if called == name])


APPLIED = (
    "crop", "flip", "rotation_matrices", "perspective_matrices", "warp_perspective", "adjust_brightness",
    "adjust_contrast", "adjust_saturation", "adjust_hue", "normalize", "erase",
)  # fmt: skip


def test_pipeline_applies_configured_operations_in_order_and_strength(monkeypatch):
    recorder = Recorder(monkeypatch, APPLIED)
    augment = create_pipeline(AugmentConfig(crop_padding=4), 10)
    images, labels = batch(500)
    torch.manual_seed(0)
    for _ in range(4):
        augmented, _ = augment(images, labels, no_flip(images))
    assert [name for name, *_ in recorder.calls] == list(APPLIED) * 4
    assert augmented.shape == (500, 3, SIZE, SIZE)

    def assert_uniform(name, low, high):
        drawn = recorder.arguments(name, 1 if name != "rotation_matrices" else 0)
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))

    assert_uniform("rotation_matrices", -15, 15)
    assert_uniform("adjust_brightness", 0.7, 1.3)
    assert_uniform("adjust_contrast", 0.7, 1.3)
    assert_uniform("adjust_saturation", 0.7, 1.3)
    assert_uniform("adjust_hue", -0.1, 0.1)
    assert recorder.arguments("crop", 1).unique().tolist() == list(range(9))
    assert recorder.arguments("flip", 1).float().mean() == pytest.approx(0.5, abs=0.04)
    is_warped = recorder.arguments("perspective_matrices", 0).flatten(1).any(1)
    assert is_warped.float().mean() == pytest.approx(0.5, abs=0.04)
    boxes = recorder.arguments("erase", 1)
    assert (boxes[:, 2] > boxes[:, 0]).float().mean() == pytest.approx(0.3, abs=0.04)


def test_pipeline_passes_result_of_each_operation_to_the_next(monkeypatch):
    recorder = Recorder(monkeypatch, APPLIED)
    images, labels = batch(8)
    create_pipeline(AugmentConfig(crop_padding=4), 10)(images, labels, no_flip(images))
    calls = {name: (arguments, result) for name, arguments, result in recorder.calls}
    matrices = calls["rotation_matrices"][1] @ calls["perspective_matrices"][1]
    assert torch.equal(calls["warp_perspective"][0][1], matrices)
    of_images = [name for name in APPLIED if not name.endswith("matrices")]
    for before, after in itertools.pairwise(of_images):
        assert calls[after][0][0] is calls[before][1], (before, after)


def test_alternating_flip_follows_flip_mask():
    images, labels = batch()
    flip_mask = labels % 2 == 0
    config = AugmentConfig(**(OFF | {"flip_mode": "alternating"}))
    augmented, _ = create_pipeline(config, 10)(images, labels, flip_mask)
    expected = normalize(flip(images / 255, flip_mask), config.mean, config.std)
    assert torch.allclose(augmented, expected, atol=1e-6)


def test_train_transform_in_last_epochs_applies_flip_and_crop_only():
    """Compared with a pipeline in which everything else is off from the start."""
    strong = AugmentConfig(crop_padding=4, cutout_size=8, mixup_p=0.3, trivial_augment="wide", strong_off_fraction=0.25)
    weak = AugmentConfig(**(OFF | {"flip_p": 0.5, "crop_padding": 4}))
    images, labels = batch()
    is_weak = []
    for epoch in range(8):
        results = []
        for config in (strong, weak):
            torch.manual_seed(epoch)
            results.append(create_train_transform(config, 10, epochs=8)(images, labels, epoch, labels > 4))
        (strong_images, strong_targets), (weak_images, weak_targets) = results
        is_weak.append(torch.equal(strong_images, weak_images) and torch.equal(strong_targets, weak_targets))
    assert is_weak == [False] * 6 + [True] * 2


def test_strong_augment_off_covers_all_keys_but_flip_and_crop():
    """A new key of the section must be on one of these lists or have the marker `StrongOff`."""
    kept = {"flip_p", "flip_mode", "crop_padding", "padding_mode", "strong_off_fraction", "mean", "std"}
    parameters = {"distortion_scale", "erasing_scale", "erasing_ratio", "cutmix_alpha", "mixup_alpha"}
    assert STRONG_AUGMENT_OFF.keys() == AugmentConfig.model_fields.keys() - kept - parameters


def test_pipeline_is_function_of_generator_state():
    augment = create_pipeline(AugmentConfig(crop_padding=4, cutout_size=8), 10)
    images, labels = batch()
    torch.manual_seed(7)
    first = augment(images, labels, no_flip(images))
    torch.manual_seed(7)
    second = augment(images, labels, no_flip(images))
    other = augment(images, labels, no_flip(images))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert first[0].dtype == torch.float32


def test_torchvision_v2_shares_parameters_across_batch():
    """The reason for this package: v2 draws one set of parameters per batch."""
    images, _ = batch(1)
    rotated = v2.RandomRotation(15)(images.repeat(8, 1, 1, 1))
    assert len(rotated.flatten(1).unique(dim=0)) == 1
