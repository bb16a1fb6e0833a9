"""The schema of a run's configuration: frozen, validated sections, one per part of the program.

A field declares everything about its key: type, range, default, meaning (its docstring), and by a marker whether a
resumed run may change it. `config_io.py` reads configuration files; the JSON schema and docs/configuration.md are
generated from these fields.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from cifar_ignite.config_fields import (
    Channels,
    Count,
    Directory,
    Name,
    NonNegative,
    Positive,
    PositiveChannels,
    Probability,
    Resume,
    Section,
    Seed,
    StrongOff,
    StrongProbability,
)
from cifar_ignite.errors import InputError


class SyntheticConfig(Section):
    """The synthetic dataset (`data.dataset` = synthetic)."""

    train_size: Count = 50_000
    """training images"""
    test_size: Count = 10_000
    """test images"""
    seed: Seed = 0
    """seed that the images are drawn from"""


class DataConfig(Section):
    """The dataset, its split and the batches."""

    dataset: str = "cifar10"
    """name of the dataset: `cifar10`, `cifar100`, `folder` (your own images, see docs/datasets.md) or `synthetic`"""
    root: Annotated[Directory, Resume.SAFE] = Path("data")
    """directory of the dataset: it contains the official files of CIFAR or their archive, or they are downloaded to it;
    for `folder`, it contains `train`"""
    image_size: int = Field(32, ge=9, le=1024)  # at 8, BatchNorm of the last stage would get one value per image
    """side of the images in pixels; `folder` resizes the center square of each image to it"""
    batch_size: Count = 128
    """images per batch, over all processes"""
    val_size: Annotated[Annotated[int, Field(ge=0)] | None, Resume.RESOLVED] = None
    """training images held out for validation, stratified by class; null is a tenth of them, or the directory `val` of
    a `folder`; 0 trains without validation"""
    split_seed: Seed = 0
    """seed of the validation split; runs with the same value are comparable"""
    max_unreadable: int = Field(0, ge=0)
    """image files of a `folder` that may be unreadable, in each of its splits; they are listed and left out"""
    synthetic: SyntheticConfig = SyntheticConfig()


class AugmentConfig(Section):
    """Augmentation of the training images, and normalization of all images."""

    flip_p: Probability = 0.5
    """probability of a horizontal flip"""
    flip_mode: Literal["random", "alternating"] = "random"
    """`random`, or `alternating`: each image in every second epoch, whatever `flip_p`"""
    crop_padding: int = Field(0, ge=0)
    """padding in pixels before a random crop to the original size; 0 is off"""
    padding_mode: Literal["constant", "reflect"] = "reflect"
    """padding of the random crop: `reflect` or `constant` (black)"""
    rotation_degrees: Annotated[float, StrongOff(0.0)] = Field(15.0, ge=0, le=180)
    """rotation, uniform in ± this many degrees"""
    perspective_p: StrongProbability = 0.5
    """probability of a perspective warp"""
    distortion_scale: float = Field(0.2, ge=0, le=0.6)  # above 0.6, corners may meet
    """largest inward move of the corners in a perspective warp, as a fraction of half the image size"""
    brightness: Annotated[float, StrongOff(0.0)] = Field(0.3, ge=0, le=1)
    """brightness factor, uniform in 1 ± this; 0 is off"""
    contrast: Annotated[float, StrongOff(0.0)] = Field(0.3, ge=0, le=1)
    """contrast factor, uniform in 1 ± this; 0 is off"""
    saturation: Annotated[float, StrongOff(0.0)] = Field(0.3, ge=0, le=1)
    """saturation factor, uniform in 1 ± this; 0 is off"""
    hue: Annotated[float, StrongOff(0.0)] = Field(0.1, ge=0, le=0.5)
    """hue shift, uniform in ± this, in turns of the color wheel; 0 is off"""
    trivial_augment: Annotated[Literal["off", "standard", "wide"], StrongOff("off")] = "off"
    """TrivialAugment, one operation per image: `off`, `standard` (RandAugment's magnitudes) or `wide` (the paper's)"""
    erasing_p: StrongProbability = 0.3
    """probability of erasing a box"""
    erasing_scale: tuple[Probability, Probability] = (0.02, 0.2)
    """smallest and largest area of the erased box, as a fraction of the image"""
    erasing_ratio: tuple[Positive, Positive] = (0.3, 3.3)
    """smallest and largest height / width of the erased box"""
    cutout_size: Annotated[int, StrongOff(0)] = Field(0, ge=0)
    """side in pixels of the square cut out of every image; 0 is off"""
    cutmix_p: StrongProbability = 0.7
    """probability of CutMix per batch"""
    cutmix_alpha: Positive = 1.0
    """parameter of the Beta(alpha, alpha) distribution of the CutMix area"""
    mixup_p: StrongProbability = 0.0
    """probability of MixUp per batch; a batch gets CutMix or MixUp, never both"""
    mixup_alpha: Positive = 0.2
    """parameter of the Beta(alpha, alpha) distribution of the MixUp weight"""
    strong_off_fraction: Probability = 0.0
    """fraction of the epochs, at the end, with flip and crop only"""
    mean: Annotated[Channels | None, Resume.RESOLVED] = (0.4914, 0.4822, 0.4465)
    """mean per channel, in [0, 1], subtracted from all images; null is that of the training images"""
    std: Annotated[PositiveChannels | None, Resume.RESOLVED] = (0.2023, 0.1994, 0.2010)
    """standard deviation per channel, in [0, 1], that all images are divided by; null is that of the training images"""

    @property
    def normalization(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation per channel.

        Raises:
            InputError: If one is null: only a training computes it.
        """
        if self.mean is None or self.std is None:
            name = "mean" if self.mean is None else "std"
            raise InputError(f"augment.{name}: null is computed by training only; give three numbers")
        return self.mean, self.std

    @model_validator(mode="after")
    def _check_ranges(self) -> "AugmentConfig":
        for name in ("erasing_scale", "erasing_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lower bound {low} is above the upper bound {high}")
        if self.cutmix_p + self.mixup_p > 1:
            raise ValueError(
                f"cutmix_p + mixup_p = {self.cutmix_p + self.mixup_p:g} is above 1; a batch gets at most one of them"
            )
        return self


class ModelConfig(Section):
    """The network; null leaves an option at the model's default, an option that the model lacks is refused."""

    name: str = "se_resnet"
    """name of a registered model (`make models`)"""
    width: Count | None = None
    """channels of the first stage; null is 32"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """dropout probability before the head; null is 0.3"""
    zero_init_residual: bool | None = None
    """whether the last BatchNorm weight of each residual branch starts at zero; null is false"""
    se_reduction: Count | None = None
    """Squeeze-and-Excitation reduction; null is 16"""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """stochastic depth: drop probability of the last block; null is 0.2"""


class OptimizerConfig(Section):
    """SGD, or Muon for convolution weights with SGD for all other parameters."""

    name: Annotated[Literal["sgd", "muon"], Resume.OPTIMIZER_LAYOUT] = "sgd"
    """`sgd`, or `muon`: Muon for convolution weights, SGD for the rest"""
    lr: Positive = 0.05
    """peak learning rate of SGD"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """momentum of SGD"""
    nesterov: bool = False
    """whether SGD uses Nesterov momentum"""
    weight_decay: NonNegative = 1e-4
    """weight decay of SGD"""
    decay_norm_and_bias: bool = True
    """whether BatchNorm parameters and biases decay too"""
    muon_lr: Positive = 0.08
    """peak learning rate of Muon"""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """momentum of Muon"""

    @model_validator(mode="after")
    def _check_nesterov(self) -> "OptimizerConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: requires momentum above 0")
        return self


class ScheduleConfig(Section):
    """The learning rate schedule: from lr / div_factor up to lr, then down to lr / div_factor / final_div_factor."""

    name: Literal["onecycle", "cosine", "linear"] = "onecycle"
    """`onecycle` (cosine up and down), `cosine` (linear up, cosine down) or `linear` (linear up and down)"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """fraction of the iterations in which the learning rate rises"""
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    """peak / initial learning rate"""
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    """initial / final learning rate"""


class TrainConfig(Section):
    """The training loop: length, loss, checkpoints and logging."""

    epochs: Count = 200
    """number of epochs"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """fraction of each target spread evenly over all classes"""
    clip_grad_norm: Positive | None = 1.0
    """largest 2-norm of the gradient; null is off"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay per iteration of the EMA of weights and BatchNorm statistics, which is then validated and saved as the
    model; smaller in the first iterations; null is off"""
    drop_path_decay_fraction: Probability = 0.0
    """fraction of the epochs, at the end, over which stochastic depth decays to zero; disables compilation"""
    sync_batch_norm: bool = False
    """whether BatchNorm uses the statistics of the images of all GPUs; disables compilation"""
    checkpoint_every: Annotated[Count, Resume.SAFE] = 10
    """epochs between checkpoints that are kept, and between updates of the figures"""
    save_every_seconds: Annotated[NonNegative, Resume.SAFE] = 300.0
    """seconds between full checkpoints within an epoch; every epoch ends with one as well"""
    max_save_failures: Annotated[int, Resume.SAFE] = Field(3, ge=0)
    """consecutive failed checkpoint writes that are tolerated"""
    patience: Count | None = 50
    """epochs without a higher validation accuracy before early stopping; null is off"""
    log_every: Annotated[Count, Resume.SAFE] = 20
    """iterations between updates of the progress bar; on a GPU also between gradient checks, and in distributed runs
    between checks of signals and of the clock"""


class Config(Section):
    """The configuration of one run."""

    seed: Seed = 0
    """seed of all randomness of the run"""
    experiment: Annotated[Name, Resume.SAFE] = Field("se", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """name of the best model and of the evaluations"""
    output_dir: Annotated[Directory, Resume.SAFE] = Path("outputs")
    """directory of all outputs"""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Resume.SAFE] = "auto"
    """`auto` (the first available of `cuda`, `mps` and `cpu`), `cpu`, `cuda`, or `mps` (an Apple GPU)"""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """precision of convolutions and matrix products: `auto` (bf16 if the GPU or CPU has instructions for it, otherwise
    fp16 on a GPU with tensor cores, otherwise fp32; on an Apple GPU fp32), `fp32`, `tf32` (fp32, with TF32 on a CUDA
    GPU), or under autocast `bf16` or `fp16` (with a gradient scaler)"""
    compile: Annotated[Literal["auto", "on", "off"], Resume.SAFE] = "auto"
    """torch.compile for the training pass: `auto` (on a CPU or one CUDA GPU, for 2,000 iterations or more; a failure is
    a warning), `on` (for the augmentation as well; a failure ends the run) or `off`. Unless it is `off`, augmentation
    and update of Muon are CUDA graphs on one CUDA GPU, however long the run is"""
    unsure_below: Annotated[Probability, Resume.SAFE] = 0.7
    """confidence below which `predict` marks a prediction as unsure; `evaluate` reports the accuracy above it"""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check_compile(self) -> "Config":
        if self.compile == "on" and self.train.drop_path_decay_fraction:
            raise ValueError(
                'compile="on" is incompatible with train.drop_path_decay_fraction (it would recompile every epoch); '
                'use "auto" or "off"'
            )
        if self.compile == "on" and self.train.sync_batch_norm:
            raise ValueError('compile="on" is incompatible with train.sync_batch_norm; use "auto" or "off"')
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "Config":
        size, padding, cutout = self.data.image_size, self.augment.crop_padding, self.augment.cutout_size
        if padding >= size:
            raise ValueError(f"augment.crop_padding: {padding} pixels must be less than data.image_size ({size})")
        if cutout > size:
            raise ValueError(f"augment.cutout_size: {cutout} pixels must be at most data.image_size ({size})")
        return self


def iterate_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, pydantic field) for every key of a section and its subsections."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from iterate_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _keys_with(marker: Resume) -> frozenset[str]:
    return frozenset(key for key, field in iterate_fields(Config) if marker in field.metadata)


RESUME_SAFE_KEYS = _keys_with(Resume.SAFE)
OPTIMIZER_LAYOUT_KEYS = _keys_with(Resume.OPTIMIZER_LAYOUT)
RESOLVED_KEYS = _keys_with(Resume.RESOLVED)
STRONG_AUGMENT_OFF = {
    key: mark.value
    for key, field in iterate_fields(AugmentConfig)
    for mark in field.metadata
    if isinstance(mark, StrongOff)
}
