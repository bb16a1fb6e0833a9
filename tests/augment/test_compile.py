"""The augmentation through torch.compile: without graph breaks, equal to the eager one within tolerance."""

import pytest
import torch

from cifar_ignite.augment.elementwise import arange
from cifar_ignite.augment.pipeline import augment_images, create_train_transform, random_augment_params
from cifar_ignite.config import AugmentConfig, Config, DataConfig
from cifar_ignite.data.loaders import create_loaders
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import TrainingError
from tests.augment.oracle import CPU, SIZE

EVERYTHING = AugmentConfig(
    crop_padding=4, padding_mode="reflect", trivial_augment="wide", cutout_size=8, perspective_p=0.9, erasing_p=0.5
)


@pytest.fixture(autouse=True)
def _without_compiled_code():
    """Compiled code of other tests would be checked first, and count towards the limit of recompilations."""
    torch.compiler.reset()


def random_batch(count):
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8)
    return images, torch.arange(count) % 10, torch.arange(count) % 2 == 0


def test_augmentation_compiles_without_graph_break():
    """Traced for real, but run by the operators of eager mode: generating code for all of it takes a minute."""
    torch.manual_seed(0)
    images, _, flip_mask = random_batch(8)
    compiled = torch.compile(augment_images, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        params = random_augment_params(images, flip_mask, EVERYTHING)
        expected = augment_images(images, params, EVERYTHING)
        assert torch.allclose(compiled(images, params, EVERYTHING), expected, atol=1e-5)


def test_compiled_augmentation_equals_eager_and_does_not_recompile():
    config = AugmentConfig(cutmix_p=0.5)
    images, labels, flip_mask = random_batch(16)
    eager = create_train_transform(config, 10, epochs=2)
    compiled = create_train_transform(config, 10, epochs=2, compile_for=images)
    arange(12_345, CPU)  # another constant in the cache must not matter
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(3):
            images, labels, flip_mask = random_batch(16)
            results = []
            for transform in (eager, compiled):
                torch.manual_seed(seed)
                results.append(transform(images, labels, 0, flip_mask))
            (expected_images, expected_targets), (augmented, targets) = results
            assert (augmented - expected_images).abs().max() < 5e-4
            assert torch.equal(targets, expected_targets)
            assert augmented.is_contiguous(memory_format=torch.channels_last)


class CompileRecorder:
    """Stands in for torch.compile: returns a function that records the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, function, **options):
        def compiled(images, *arguments):
            assert not torch.is_grad_enabled()  # in each mode it would be compiled separately
            self.sizes.append(len(images))
            return function(images, *arguments)

        return compiled


@pytest.mark.parametrize(
    ("mode", "strong_off_fraction", "sizes"),
    [("off", 0.5, []), ("on", 0.0, [16, 16, 16]), ("on", 0.5, [16, 16, 16, 16])],
)
def test_only_complete_batches_are_compiled_if_requested(monkeypatch, mode, strong_off_fraction, sizes):
    recorder = CompileRecorder()
    monkeypatch.setattr(torch, "compile", recorder)
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 40})
    augment = AugmentConfig(strong_off_fraction=strong_off_fraction)
    dataset = load_dataset(data, train=True)
    loader, _ = create_loaders(Config(compile=mode, data=data, augment=augment), dataset, dataset, CPU)
    assert len(list(loader)) == 3
    assert recorder.sizes == sizes  # one compilation, a second one of the last epochs' augmentation, then two batches


def test_failing_compiler_is_translated(monkeypatch):
    def fail(function, **options):
        raise RuntimeError("no compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(TrainingError, match=r"^torch.compile failed \(no compiler\); use compile=off$"):
        create_train_transform(AugmentConfig(), 10, epochs=2, compile_for=random_batch(4)[0])
