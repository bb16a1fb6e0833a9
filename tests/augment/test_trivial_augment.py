"""TrivialAugment against torchvision, operation by operation."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from cifar_ignite.augment.trivial_augment import (
    MAX_MAGNITUDES,
    NUM_MAGNITUDE_BINS,
    OPS,
    TrivialAugmentParams,
    random_trivial_augment,
    trivial_augment,
)
from tests.augment.oracle import CPU, SIZE

# torchvision has no public way to apply a given operation at a given magnitude; checked with 0.26 to 0.29.
ORACLE_SPACES = {"wide": v2.TrivialAugmentWide._AUGMENTATION_SPACE, "standard": v2.RandAugment._AUGMENTATION_SPACE}
apply_oracle = v2.TrivialAugmentWide()._apply_image_or_video_transform
ORACLE_OPS = {  # torchvision's name of each operation
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
}
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def create_params(ops, bins, signs):
    return TrivialAugmentParams(ops, bins / (NUM_MAGNITUDE_BINS - 1), signs)


@pytest.mark.parametrize("space", ORACLE_SPACES)
@pytest.mark.parametrize("op", OPS)
def test_operation_matches_torchvision_at_every_magnitude(images, op, space):
    """The images have integer gray levels, as decoded files have; every image has another magnitude and sign."""
    assert set(ORACLE_OPS) == set(OPS)
    assert set(ORACLE_OPS.values()) == set(ORACLE_SPACES[space])
    images = (images * 255).round()
    bins, signs = torch.arange(16) * 2, torch.tensor([1.0, -1.0]).repeat(8)
    magnitudes, is_signed = ORACLE_SPACES[space][ORACLE_OPS[op]]
    table = magnitudes(NUM_MAGNITUDE_BINS, SIZE, SIZE)

    def expected_image(image, bin_, sign):
        magnitude = (0.0 if table is None else float(table[bin_])) * (sign if is_signed else 1)
        # torchvision would round the geometry of uint8, and would not round the colors of float.
        if op in GEOMETRY:
            return apply_oracle(image / 255, ORACLE_OPS[op], magnitude, InterpolationMode.BILINEAR, {}) * 255
        return apply_oracle(image.byte(), ORACLE_OPS[op], magnitude, InterpolationMode.BILINEAR, {}).float()

    rows = zip(images, bins.tolist(), signs.tolist(), strict=True)
    expected = torch.stack([expected_image(*row) for row in rows])
    params = create_params(torch.full((16,), OPS.index(op)), bins, signs)
    difference = (255 * trivial_augment(images / 255, params, MAX_MAGNITUDES[space]) - expected).abs()
    if op in ("posterize", "equalize", "identity"):
        assert difference.max() < 0.01
    elif op == "solarize":  # a gray level that equals the threshold except for rounding may be on either side
        assert (difference > 0.01).float().mean() < 0.002
    else:  # torchvision truncates to integer gray levels, and rounds what it blends with as well
        assert difference.max() < 1.02 + 1.0 * (op in ("contrast", "saturation", "sharpness"))
    if op != "identity":
        assert (expected - images).abs().max() > 10


def test_image_gets_its_own_operation_only(images):
    """A batch with all operations equals the results of its images alone."""
    ops, bins, signs = torch.arange(14), torch.arange(14) + 12, torch.ones(14)
    mixed = trivial_augment(images[:14], create_params(ops, bins, signs), MAX_MAGNITUDES["wide"])
    for row in range(14):
        rows = slice(row, row + 1)
        params = create_params(ops[rows], bins[rows], signs[rows])
        assert torch.allclose(mixed[rows], trivial_augment(images[rows], params, MAX_MAGNITUDES["wide"]), atol=1e-6)


def test_random_trivial_augment_is_uniform():
    torch.manual_seed(0)
    params = random_trivial_augment(30_000, CPU)
    for drawn, count in ((params.ops, 14), (params.fractions, 31), (params.signs, 2)):
        values, counts = drawn.unique(return_counts=True)
        assert len(values) == count
        assert (counts / 30_000 - 1 / count).abs().max() < 0.15 / count
    assert torch.allclose(params.fractions.unique(), torch.linspace(0, 1, 31))
    assert params.signs.unique().tolist() == [-1, 1]
