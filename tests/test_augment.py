"""Each augmentation against torchvision's functional transforms, applied image by image with the same parameters."""

import itertools
import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as oracle

from cifar_ignite import augment
from cifar_ignite.config import AugmentConfig

CPU = torch.device("cpu")
SIZE = 32
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


@pytest.fixture
def images():
    """Smooth coloured images, as photographs are, with a few greys (hue and saturation are edge cases there)."""
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(16, 3, 6, 6), SIZE, mode="bicubic").clamp(0, 1)
    smooth[0] = smooth[0, :1]
    smooth[1], smooth[2] = 0, 1
    return smooth


def one_by_one(function, images, parameters):
    return torch.stack([function(image, value) for image, value in zip(images, parameters, strict=True)])


def interior(difference, border=0):
    return difference[..., border : SIZE - border, border : SIZE - border].abs().max().item()


def test_flip_is_exact(images):
    flipped = torch.arange(16) % 3 == 0
    expected = one_by_one(lambda image, f: oracle.horizontal_flip(image) if f else image, images, flipped)
    assert torch.equal(augment.flip(images, flipped), expected)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_is_exact(images, mode):
    offsets = augment.random_offsets(16, 4, CPU)
    expected = one_by_one(
        lambda image, at: oracle.crop(oracle.pad(image, [4], padding_mode=mode), int(at[0]), int(at[1]), SIZE, SIZE),
        images,
        offsets,
    )
    assert torch.equal(augment.crop(images, offsets, 4, mode), expected)


def test_rotation_matches_torchvision(images):
    degrees = torch.linspace(-30, 30, 16)
    expected = one_by_one(
        lambda image, angle: oracle.rotate(image, angle.item(), InterpolationMode.BILINEAR), images, degrees
    )
    warped = augment.warp(images, augment.rotation_matrices(degrees))
    assert interior(warped - expected, border=2) < 2 / 255
    assert interior(warped - expected) < 1e-4


def test_perspective_matches_torchvision(images):
    corners = augment.random_corners(16, 1.0, 0.4, SIZE, CPU)
    edge = SIZE - 1
    start = [[0, 0], [edge, 0], [edge, edge], [0, edge]]

    def expected_one(image, inwards):
        end = [
            [x + (dx if x == 0 else -dx), y + (dy if y == 0 else -dy)]
            for (x, y), (dx, dy) in zip(start, inwards.int().tolist(), strict=True)
        ]
        return oracle.perspective(image, start, end, InterpolationMode.BILINEAR)

    warped = augment.warp(images, augment.perspective_matrices(corners, SIZE))
    assert interior(warped - one_by_one(expected_one, images, corners), border=2) < 2 / 255
    assert interior(warped - one_by_one(expected_one, images, corners)) < 1e-3


def test_the_strongest_perspective_is_finite():
    strongest = AugmentConfig.model_fields["perspective_distortion"].metadata[1].le
    farthest = int(strongest * (SIZE // 2))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, farthest])] * 8).view(-1, 4, 2)
    assert augment.perspective_matrices(corners, SIZE).isfinite().all()
    images = torch.rand(1, 3, SIZE, SIZE).expand(len(corners), -1, -1, -1)
    assert augment.warp(images, augment.perspective_matrices(corners, SIZE)).isfinite().all()


def test_the_identity_warp_changes_nothing(images):
    matrices = augment.rotation_matrices(torch.zeros(16)) @ augment.perspective_matrices(torch.zeros(16, 4, 2), SIZE)
    assert interior(augment.warp(images, matrices) - images) < 1e-4


def test_a_composition_of_warps_is_the_warp_by_the_product():
    """Where the intermediate picture is smooth, warping twice and warping once by the product agree."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    smooth = torch.stack([torch.sin(x / 9), torch.cos(y / 8), torch.sin((x + y) / 10)]).expand(8, -1, -1, -1) / 2 + 0.5
    rotation = augment.rotation_matrices(torch.linspace(-15, 15, 8))
    perspective = augment.perspective_matrices(augment.random_corners(8, 1.0, 0.2, SIZE, CPU), SIZE)
    twice = augment.warp(augment.warp(smooth, rotation), perspective)
    once = augment.warp(smooth, rotation @ perspective)
    assert interior(twice - once, border=9) < 2 / 255


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (augment.adjust_brightness, oracle.adjust_brightness, 0.0, 2.0),
        (augment.adjust_contrast, oracle.adjust_contrast, 0.0, 2.0),
        (augment.adjust_saturation, oracle.adjust_saturation, 0.0, 2.0),
        (augment.adjust_hue, oracle.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_matches_torchvision(images, ours, theirs, low, high):
    factors = torch.linspace(low, high, 16)
    expected = one_by_one(lambda image, factor: theirs(image, factor.item()), images, factors)
    assert interior(ours(images, factors) - expected) < 1e-5
    as_bytes = (images * 255).round().to(torch.uint8)
    expected = one_by_one(lambda image, factor: theirs(image, factor.item()), as_bytes, factors)
    assert (255 * ours(as_bytes / 255, factors) - expected).abs().max() <= 2


def test_erasing_is_exact(images):
    boxes = augment.random_boxes(16, 0.7, (0.02, 0.4), (0.3, 3.3), SIZE, CPU)
    expected = one_by_one(
        lambda image, b: oracle.erase(image, b[0], b[1], b[2] - b[0], b[3] - b[1], torch.zeros(1)),
        images,
        boxes.tolist(),
    )
    assert torch.equal(augment.erase(images, boxes), expected)


def test_cutout_is_clipped_at_the_border(images):
    boxes = augment.random_squares(16, 12, SIZE, CPU)
    clipped = boxes.clamp(0, SIZE).tolist()
    expected = one_by_one(
        lambda image, b: oracle.erase(image, b[0], b[1], b[2] - b[0], b[3] - b[1], torch.zeros(1)), images, clipped
    )
    assert (boxes < 0).any()
    assert (boxes > SIZE).any()
    assert torch.equal(augment.erase(images, boxes), expected)


def test_normalize_matches_torchvision(images):
    config = AugmentConfig()
    expected = oracle.normalize(images, list(config.mean), list(config.std))
    assert torch.allclose(augment.normalize(images, config.mean, config.std), expected, atol=1e-6)


# --- Drawn parameters -------------------------------------------------------------------------------------------


def test_drawn_parameters_fill_their_ranges():
    torch.manual_seed(0)
    many = 20_000
    degrees = augment.random_uniform(many, -15, 15, CPU)
    assert -15 <= degrees.min() < -14.9
    assert 14.9 < degrees.max() < 15
    assert degrees.mean().abs() < 0.3
    assert degrees.std() == pytest.approx(30 / math.sqrt(12), rel=0.02)

    assert augment.random_choice(many, 0.3, CPU).float().mean() == pytest.approx(0.3, abs=0.015)
    assert not augment.random_choice(many, 0.0, CPU).any()
    assert augment.random_choice(many, 1.0, CPU).all()

    offsets = augment.random_offsets(many, 4, CPU)
    assert torch.equal(offsets.unique(), torch.arange(9))

    corners = augment.random_corners(many, 0.5, 0.2, SIZE, CPU)
    assert torch.equal(corners.unique(), torch.arange(4.0))  # whole pixels from 0 to 0.2 * 16
    assert corners.any(-1).any(-1).float().mean() == pytest.approx(0.5, abs=0.02)


def test_erased_boxes_have_the_stated_share_area_and_aspect():
    torch.manual_seed(0)
    boxes = augment.random_boxes(20_000, 0.3, (0.02, 0.2), (0.3, 3.3), SIZE, CPU)
    extent = (boxes[:, 2:] - boxes[:, :2]).float()
    erased = extent.prod(1) > 0
    assert erased.float().mean() == pytest.approx(0.3, abs=0.015)
    area, ratio = extent[erased].prod(1) / SIZE**2, extent[erased, 0] / extent[erased, 1]
    # Rounding to whole pixels moves the area of a narrow box by a few per cent of the image.
    assert 0.01 < area.min() < 0.03
    assert 0.19 < area.max() < 0.23
    assert area.mean() == pytest.approx(0.11, abs=0.005)
    assert ratio.log().mean().abs() < 0.05
    assert 0.2 < ratio.min() < 0.4
    assert 2.8 < ratio.max() < 4.5
    assert boxes.min() == 0
    assert boxes.max() == SIZE


# --- The pipeline -----------------------------------------------------------------------------------------------


# --- TrivialAugment -----------------------------------------------------------------------------------------------

ORACLE_SPACES = {"wide": v2.TrivialAugmentWide._AUGMENTATION_SPACE, "standard": v2.RandAugment._AUGMENTATION_SPACE}
ORACLE_OPS = {  # ours: torchvision's
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


@pytest.mark.parametrize("space", ORACLE_SPACES)
@pytest.mark.parametrize("op", augment.OPS)
def test_each_operation_is_torchvisions_at_the_same_strength(images, op, space):
    """Whole grey levels, as decoded pictures have; for each image another strength and sign."""
    assert set(ORACLE_OPS) == set(augment.OPS)
    assert set(ORACLE_OPS.values()) == set(ORACLE_SPACES[space])
    images = (images * 255).round()
    ops = torch.full((16,), augment.OPS.index(op))
    strengths, signs = torch.arange(16) * 2, torch.tensor([1.0, -1.0]).repeat(8)
    magnitudes, signed = ORACLE_SPACES[space][ORACLE_OPS[op]]
    table = magnitudes(augment.STRENGTHS, SIZE, SIZE)

    def one(image, strength, sign):
        magnitude = 0.0 if table is None else float(table[strength])
        return v2.TrivialAugmentWide()._apply_image_or_video_transform(
            image, ORACLE_OPS[op], magnitude * (sign if signed else 1), InterpolationMode.BILINEAR, {}
        )

    expected = torch.stack(
        [
            # Geometry of uint8 would be rounded; colour of float would not be in whole grey levels.
            one(image / 255, int(strength), float(sign)) * 255
            if op in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
            else one(image.byte(), int(strength), float(sign)).float()
            for image, strength, sign in zip(images, strengths, signs, strict=True)
        ]
    )
    ours = 255 * augment.trivial_augment(images / 255, ops, strengths, signs, augment.TRIVIAL_SPACES[space])
    difference = (ours - expected).abs()
    if op in ("posterize", "equalize", "identity"):
        assert difference.max() < 0.01
    elif op == "solarize":  # a grey level that equals the threshold but for rounding may fall on either side
        assert (difference > 0.01).float().mean() < 0.002
    else:  # torchvision truncates to whole grey levels, and rounds what it blends with too
        assert difference.max() < 1.02 + 1.0 * (op in ("contrast", "saturation", "sharpness"))
    if op != "identity":
        assert (expected - images).abs().max() > 10


def test_an_image_gets_its_own_operation_and_no_other(images):
    """A mixed batch is what each image gives alone."""
    ops, strengths, signs = torch.arange(14), torch.arange(14) + 12, torch.ones(14)
    space = augment.TRIVIAL_SPACES["wide"]
    mixed = augment.trivial_augment(images[:14], ops, strengths, signs, space)
    for row in range(14):
        rows = slice(row, row + 1)
        alone = augment.trivial_augment(images[rows], ops[rows], strengths[rows], signs[rows], space)
        assert torch.allclose(mixed[rows], alone, atol=1e-6)


def test_operations_strengths_and_signs_are_drawn_alike():
    torch.manual_seed(0)
    ops, strengths, signs = augment.random_ops(30_000, CPU)
    for drawn, count in ((ops, 14), (strengths, 31), (signs, 2)):
        values, counts = drawn.unique(return_counts=True)
        assert len(values) == count
        assert (counts / 30_000 - 1 / count).abs().max() < 0.15 / count
    assert signs.unique().tolist() == [-1, 1]


# --- The pipeline -------------------------------------------------------------------------------------------------


def batch(count=64, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8), torch.arange(count) % 10


def test_everything_off_is_the_normalised_image():
    config = AugmentConfig(**OFF)
    images, labels = batch()
    augmented, targets = augment.create_pipeline(config, 10)(images, labels, ~labels.bool())
    assert torch.allclose(augmented, augment.normalize(images / 255, config.mean, config.std), atol=1e-6)
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
def test_images_of_one_batch_get_parameters_of_their_own(on):
    """The same image 64 times comes out in more than one way."""
    images, labels = batch(1)
    augmented, _ = augment.create_pipeline(AugmentConfig(**(OFF | on)), 10)(
        images.repeat(64, 1, 1, 1), labels.repeat(64), torch.arange(64) % 2 == 0
    )
    assert len(augmented.flatten(1).unique(dim=0)) > 1


class Recorder:
    """Records what a function of augment.py is called with, in the order of the calls."""

    def __init__(self, monkeypatch, *names):
        self.calls = []
        for name in names:
            monkeypatch.setattr(augment, name, self.wrap(name, getattr(augment, name)))

    def wrap(self, name, function):
        def call(*arguments):
            result = function(*arguments)
            self.calls.append((name, arguments, result))
            return result

        return call

    def arguments(self, name, position):
        return torch.cat([arguments[position] for called, arguments, _ in self.calls if called == name])


APPLIED = (
    "crop", "flip", "rotation_matrices", "perspective_matrices", "warp", "adjust_brightness", "adjust_contrast",
    "adjust_saturation", "adjust_hue", "normalize", "erase",
)  # fmt: skip


def test_the_pipeline_applies_what_is_configured_in_order_and_strength(monkeypatch):
    recorder = Recorder(monkeypatch, *APPLIED)
    config = AugmentConfig(crop_padding=4)
    pipeline = augment.create_pipeline(config, 10)
    images, labels = batch(500)
    torch.manual_seed(0)
    for _ in range(4):
        out, _ = pipeline(images, labels, torch.zeros(len(images), dtype=torch.bool))
    assert [name for name, *_ in recorder.calls] == list(APPLIED) * 4
    assert out.shape == (500, 3, SIZE, SIZE)

    def spread(name, low, high):
        drawn = recorder.arguments(name, 1 if name != "rotation_matrices" else 0)
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))

    spread("rotation_matrices", -15, 15)
    spread("adjust_brightness", 0.7, 1.3)
    spread("adjust_contrast", 0.7, 1.3)
    spread("adjust_saturation", 0.7, 1.3)
    spread("adjust_hue", -0.1, 0.1)
    assert recorder.arguments("crop", 1).unique().tolist() == list(range(9))
    assert recorder.arguments("flip", 1).float().mean() == pytest.approx(0.5, abs=0.04)
    moved = recorder.arguments("perspective_matrices", 0).flatten(1).any(1)
    assert moved.float().mean() == pytest.approx(0.5, abs=0.04)
    boxes = recorder.arguments("erase", 1)
    assert (boxes[:, 2] > boxes[:, 0]).float().mean() == pytest.approx(0.3, abs=0.04)

    # Each step works on the result of the one before, and the perspective is seen last.
    steps = {name: (arguments, result) for name, arguments, result in recorder.calls}
    matrices = steps["rotation_matrices"][1] @ steps["perspective_matrices"][1]
    assert torch.equal(steps["warp"][0][1], matrices)
    images_seen = [name for name in APPLIED if not name.endswith("matrices")]
    for before, after in itertools.pairwise(images_seen):
        assert steps[after][0][0] is steps[before][1], (before, after)


def test_rotation_then_perspective_as_torchvision_does_them_one_after_the_other(images):
    """Which of the two comes first shows in the place of a dot."""
    dot = torch.zeros(1, 3, SIZE, SIZE)
    dot[..., 8:11, 21:24] = 1
    corners = torch.tensor([[[6.0, 1.0], [0.0, 5.0], [3.0, 0.0], [0.0, 6.0]]])
    ours = augment.warp(
        dot, augment.rotation_matrices(torch.tensor([40.0])) @ augment.perspective_matrices(corners, SIZE)
    )
    edge = SIZE - 1
    start, end = [[0, 0], [edge, 0], [edge, edge], [0, edge]], [[6, 1], [edge, 5], [edge - 3, edge], [0, edge - 6]]
    theirs = oracle.perspective(
        oracle.rotate(dot, 40.0, InterpolationMode.BILINEAR), start, end, InterpolationMode.BILINEAR
    )

    def centre(picture):
        weight = picture[0, 0]
        grid = torch.arange(SIZE, dtype=torch.float)
        return torch.stack([(weight.sum(1) * grid).sum(), (weight.sum(0) * grid).sum()]) / weight.sum()

    assert (centre(ours) - centre(theirs)).abs().max() < 0.1


def test_alternating_flip_mirrors_whose_turn_it_is():
    images, labels = batch()
    mirrored = labels % 2 == 0
    config = AugmentConfig(**(OFF | {"flip_mode": "alternating"}))
    out, _ = augment.create_pipeline(config, 10)(images, labels, mirrored)
    expected = augment.normalize(augment.flip(images / 255, mirrored), config.mean, config.std)
    assert torch.allclose(out, expected, atol=1e-6)


def test_the_last_part_of_a_training_has_flip_and_crop_alone():
    """Against a pipeline in which all else is off from the beginning."""
    strong = AugmentConfig(crop_padding=4, cutout_size=8, mixup_p=0.3, trivial_augment="wide", off_fraction=0.25)
    gentle = AugmentConfig(**(OFF | {"flip_p": 0.5, "crop_padding": 4}))
    images, labels = batch()
    alike = []
    for epoch in range(8):
        outs = []
        for config in (strong, gentle):
            torch.manual_seed(epoch)
            outs.append(augment.create_augment(config, 10, epochs=8)(images, labels, epoch, labels > 4))
        alike.append(torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1]))
    assert alike == [False] * 6 + [True] * 2


def test_off_leaves_no_augmentation_but_flip_and_crop():
    """A new key of the configuration is on one list or the other."""
    kept = {"flip_p", "flip_mode", "crop_padding", "crop_mode", "off_fraction", "mean", "std"}
    shapes = {"perspective_distortion", "erasing_scale", "erasing_ratio", "cutmix_alpha", "mixup_alpha"}
    assert augment.OFF.keys() == AugmentConfig.model_fields.keys() - kept - shapes


def test_the_same_seed_gives_the_same_batch():
    pipeline = augment.create_pipeline(AugmentConfig(crop_padding=4, cutout_size=8), 10)
    images, labels = batch()
    torch.manual_seed(7)
    first = pipeline(images, labels, torch.zeros(len(images), dtype=torch.bool))
    torch.manual_seed(7)
    second = pipeline(images, labels, torch.zeros(len(images), dtype=torch.bool))
    other = pipeline(images, labels, torch.zeros(len(images), dtype=torch.bool))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert first[0].dtype == torch.float32


def test_cutmix_mixes_labels_by_the_area_really_pasted():
    """Each image is filled with its label, so the pasted area can be counted."""
    labels = torch.arange(10)
    images = labels.float()[:, None, None, None].expand(10, 3, SIZE, SIZE).clone()
    config = AugmentConfig(cutmix_p=1.0)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, targets = augment.random_mix(images, labels, config, 10)
        pasted = (mixed[:, 0] != labels[:, None, None]).float().mean((1, 2))
        partner = labels.roll(1)
        assert torch.allclose(targets.gather(1, partner[:, None])[:, 0], pasted, atol=1e-6)
        assert torch.allclose(targets.gather(1, labels[:, None])[:, 0], 1 - pasted, atol=1e-6)
        shares.append(pasted[0].item())
    assert min(shares) < 0.2
    assert max(shares) > 0.5


def test_mixup_blends_images_and_labels_alike():
    labels = torch.arange(10)
    images = labels.float()[:, None, None, None].expand(10, 3, 4, 4).clone()
    torch.manual_seed(0)
    mixed, targets = augment.random_mix(images, labels, AugmentConfig(cutmix_p=0, mixup_p=1.0, mixup_alpha=1.0), 10)
    assert torch.allclose(mixed[:, 0, 0, 0], targets @ torch.arange(10.0), atol=1e-5)
    assert (targets.max(1).values < 1).all()


def test_how_often_a_batch_is_mixed():
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    pure = AugmentConfig(cutmix_p=0.5, mixup_p=0.3)
    torch.manual_seed(0)
    untouched = sum(augment.random_mix(images, labels, pure, 10)[1].max() == 1 for _ in range(2000))
    # CutMix of 4x4 pixels pastes nothing or everything now and then, so "untouched" is a little over 0.2.
    assert 0.2 < untouched / 2000 < 0.5


def test_torchvision_alone_would_not_do():
    """Why this module exists: v2 draws one set of parameters for a batch."""
    images, _ = batch(1)
    same = v2.RandomRotation(15)(images.repeat(8, 1, 1, 1))
    assert len(same.flatten(1).unique(dim=0)) == 1
