"""The JSON configuration as typed, frozen, validated objects.

A run is one complete configuration. The groups mirror the modules that read them; a new knob is a field here, in
the group of the code that reads it, and a line in the README's table.
"""

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Channels = tuple[float, float, float]
SCHEMA_KEY = "$schema"


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that says what, and what to do. Exit status 2.

    Attributes:
        is_first: whether this process was the first of several to fail; None where that is not known.
    """

    status = 2
    is_first: bool | None = None


class RunFailedError(Exception):
    """The run cannot go on though the input was right (it diverged, say); one line."""

    status = 1
    is_first: bool | None = None
    is_lost = False
    """Whether another process has gone, so that what is under way with it may never end."""


@contextlib.contextmanager
def telling_of_memory() -> Iterator[None]:
    """Turn the errors of memory that is used up, of a GPU or of the machine, into one line.

    Raises:
        RunFailedError: there was not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        # What torch, its allocator for CPUs, CUDA, and cuDNN or cuBLAS say.
        words = "OutOfMemory", "CPUAllocator", "out of memory", "ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not any(word in reason for word in words):
            raise
        raise RunFailedError(
            f"out of memory ({reason}); take a smaller data.batch_size or model.width, or end what else uses it"
        ) from None


class Section(BaseModel):
    """A group of keys: immutable, unknown keys refused, no NaN or infinity. A docstring says what a key means."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class SyntheticConfig(Section):
    """The embedded dataset (`data.source` = synthetic)."""

    train_size: Count = 50_000
    """images of the embedded training set"""
    test_size: Count = 10_000
    """images of the embedded test set"""
    seed: Seed = 0
    """of the embedded dataset"""


class DataConfig(Section):
    """What is read and how it is cut into batches."""

    source: Literal["cifar10", "synthetic"] = "cifar10"
    """`cifar10` or `synthetic`"""
    root: Folder = Path("data")
    """folder that holds, or gets, `cifar-10-batches-py`"""
    batch_size: Count = 128
    """images a batch"""
    validation: int = Field(5_000, ge=0)
    """training images held out, stratified by class; 0 trains on all"""
    split_seed: Seed = 0
    """which images are held out; the same in all runs, so that they compare"""
    synthetic: SyntheticConfig = SyntheticConfig()


class AugmentConfig(Section):
    """Strength of each augmentation of the training images, and the normalisation of all images."""

    flip_p: Probability = 0.5
    """probability of a horizontal flip"""
    flip_mode: Literal["random", "alternating"] = "random"
    """`random`, or `alternating`: each image in every other epoch, whatever `flip_p`"""
    crop_padding: int = Field(0, ge=0, lt=32)
    """pixels of padding before a random crop back to 32x32; 0 is off"""
    crop_mode: Literal["constant", "reflect"] = "reflect"
    """`reflect` or `constant` (black) padding"""
    rotation_degrees: float = Field(15.0, ge=0, le=180)
    """rotation, uniform in ± this"""
    perspective_p: Probability = 0.5
    """probability of a perspective warp"""
    perspective_distortion: float = Field(0.2, ge=0, le=0.6)  # beyond, corners may meet
    """how far corners move in, as a share of half the image"""
    brightness: float = Field(0.3, ge=0, le=1)
    """factor, uniform in 1 ± this; 0 is off"""
    contrast: float = Field(0.3, ge=0, le=1)
    """factor, uniform in 1 ± this; 0 is off"""
    saturation: float = Field(0.3, ge=0, le=1)
    """factor, uniform in 1 ± this; 0 is off"""
    hue: float = Field(0.1, ge=0, le=0.5)
    """shift, uniform in ± this, in turns of the colour circle; 0 is off"""
    trivial_augment: Literal["off", "standard", "wide"] = "off"
    """TrivialAugment, one operation an image: `off`, `standard` (RandAugment's strengths) or `wide` (the paper's)"""
    erasing_p: Probability = 0.3
    """probability of erasing a box"""
    erasing_scale: tuple[Probability, Probability] = (0.02, 0.2)
    """least and greatest share of the area erased"""
    erasing_ratio: tuple[Positive, Positive] = (0.3, 3.3)
    """least and greatest height / width of the box"""
    cutout_size: int = Field(0, ge=0, le=32)
    """pixels a side of the square cut out of every image; 0 is off"""
    cutmix_p: Probability = 0.7
    """probability that a batch gets CutMix"""
    cutmix_alpha: Positive = 1.0
    """of the Beta(alpha, alpha) that its area is drawn from"""
    mixup_p: Probability = 0.0
    """probability that a batch gets mixup, where it does not get CutMix"""
    mixup_alpha: Positive = 0.2
    """of the Beta(alpha, alpha) that its weight is drawn from"""
    off_fraction: Probability = 0.0
    """share of the epochs, the last ones, in which only flip and crop are done"""
    mean: Channels = (0.4914, 0.4822, 0.4465)
    """of each channel in [0, 1], subtracted from all images"""
    std: tuple[Positive, Positive, Positive] = (0.2023, 0.1994, 0.2010)
    """of each channel in [0, 1], by which all images are divided"""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentConfig":
        for name in ("erasing_scale", "erasing_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lower bound {low} is above the upper bound {high}")
        if self.cutmix_p + self.mixup_p > 1:
            raise ValueError(
                f"cutmix_p + mixup_p = {self.cutmix_p + self.mixup_p:g} is above 1: a batch gets one of them"
            )
        return self


class ModelConfig(Section):
    """Which network. None leaves an option at the model's own default; an option the model lacks is refused."""

    name: str = "se_resnet"
    """a model of `make models`"""
    width: Count | None = None
    """channels of the first stage; null takes the model's own, 32"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """probability of dropping a feature before the head; null takes 0.3"""
    zero_init_residual: bool | None = None
    """residual branches begin as zero; null takes false"""
    se_reduction: Count | None = None
    """Squeeze-and-Excitation reduction; null takes 16"""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | None = None
    """stochastic depth: drop probability of the last block; null takes 0.2"""


class OptimizerConfig(Section):
    """SGD with momentum; or Muon (muon.py) on filters, SGD on all else. `lr` and `muon_lr`: peaks of the schedule."""

    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`, or `muon`: Muon for the filters of convolutions, SGD for the rest"""
    lr: Positive = 0.05
    """highest learning rate of the schedule"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of SGD"""
    nesterov: bool = False
    """Nesterov's momentum"""
    weight_decay: NonNegative = 1e-4
    """of SGD"""
    decay_norm_and_bias: bool = True
    """whether BatchNorm's parameters and biases decay too"""
    muon_lr: Positive = 0.08
    """highest learning rate of Muon"""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """of Muon"""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "OptimizerConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        return self


class ScheduleConfig(Section):
    """How the learning rate moves from lr / div_factor to lr and down to lr / div_factor / final_div_factor."""

    name: Literal["onecycle", "cosine", "linear"] = "onecycle"
    """`onecycle` (cosine up and down), `cosine` (linear up, cosine down) or `linear` (up and down)"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """share of the iterations in which the learning rate rises"""
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    """highest / first learning rate"""
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    """first / last learning rate"""


class TrainConfig(Section):
    """The loop: how long, the loss, and what is saved and shown when."""

    epochs: Count = 200
    """passes over the training images"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of each target spread over all classes"""
    clip_grad_norm: Positive | None = 1.0
    """largest 2-norm of the gradient; null leaves it"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay an iteration of the average of weights and BatchNorm statistics that is judged and saved as the model;
    smaller at first; null is off"""
    whiten_stem: bool = False
    """the first convolution is frozen at the principal components of patches of the training images"""
    drop_path_ramp: Probability = 0.0
    """share of the epochs, the last ones, over which stochastic depth falls to zero; then nothing is compiled"""
    sync_batch_norm: bool = False
    """between GPUs: BatchNorm normalises by the statistics of all processes' images; then nothing is compiled"""
    checkpoint_every: Count = 10
    """epochs between checkpoints that stay, and between drawings of the figures"""
    save_every_seconds: NonNegative = 300.0
    """between saves of the newest state within an epoch; each epoch ends with one in any case"""
    save_failures_allowed: int = Field(3, ge=0)
    """failed checkpoint writes in a row that are borne"""
    patience: Count | None = 50
    """epochs without a better validation accuracy before stopping; null is off"""
    log_every: Count = 20
    """iterations between updates of the progress bar; on a GPU also between looks at the gradient, and, with several
    processes, at signals and the clock"""


class Config(Section):
    """One complete run."""

    seed: Seed = 0
    """of all randomness of the run"""
    experiment: str = Field("se", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """name of the best model and the evaluations"""
    output_dir: Folder = Path("outputs")
    """folder of everything that is written"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` (the GPU if there is one), `cpu`, `cuda`"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of convolutions and matrix products, by autocast: `auto` (bf16 where the GPU or CPU has instructions for it, else
    fp32), `fp32`, `bf16`, `fp16` (with a gradient scaler)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """the training pass through torch.compile: `auto` (on a CPU, for trainings of 2,000 iterations and more; if that
    fails, a warning), `on` (if that fails, the run does), `off`"""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _compiled_model_is_constant(self) -> "Config":
        if self.compile == "on" and self.train.drop_path_ramp:
            raise ValueError("compile: on would compile anew each epoch with train.drop_path_ramp; take auto or off")
        if self.compile == "on" and self.train.sync_batch_norm:
            raise ValueError("compile: on cannot be had with train.sync_batch_norm; take auto or off")
        return self


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a JSON file and apply `section.key=value` overrides.

    Args:
        path: a JSON object with the groups of `Config`; missing keys keep their defaults, "$schema" is for editors.
        overrides: each `section.key=value`; the value is JSON, or else taken as a string.

    Raises:
        InputError: the file is missing or malformed, a key is unknown or given twice, a value is out of range.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        tree = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    # A key given twice; a number of more digits, or brackets deeper, than Python reads.
    except (InputError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None
    if isinstance(tree, dict):
        tree.pop(SCHEMA_KEY, None)
    return parse_config(tree, str(path), overrides)


def parse_config(tree: Any, source: str, overrides: Iterable[str] = ()) -> Config:
    """Validate a plain tree of dicts (as JSON gives it); `source` begins the message of an `InputError`."""
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected a JSON object of configuration groups, got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    try:
        # Through JSON, so that strict types are JSON's types: a list is a tuple, an int is a float, "1" is neither.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise InputError(f"{source}: {problems}") from None


def describe_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, by which editors complete and check it: configs/schema.json."""
    schema = Config.model_json_schema()
    schema["properties"][SCHEMA_KEY] = {"type": "string", "description": "where this schema is, for editors"}
    return {SCHEMA_KEY: "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "cifar_ignite"}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"root": 1}} -> {"data.root": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for the closest known name, or the list of all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *groups, key = path.strip().split(".")
    if not equals or not key or not all(groups):
        raise InputError(f"--set {override}: expected section.key=value, for example optimizer.lr=0.1")
    section: Any = Config
    for group in groups:
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise InputError(f"--set {override}: {group} is not a group of keys")
        section = _type_of(section, group)
    tree[key] = text
    # A folder named 2026 is still a name; everything else is JSON.
    if _type_of(section, key) not in (str, Path):
        with contextlib.suppress(ValueError, RecursionError):
            tree[key] = json.loads(text)


def _type_of(section: Any, key: str) -> Any:
    """The type of a field; None for what is no field (which validation reports)."""
    field = getattr(section, "model_fields", {}).get(key)
    return field and field.annotation


def _describe(problem: Any) -> str:
    """One pydantic error as "data.batch_size: what is wrong (got ...)"."""
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for group in location[:-1]:
            section = section.model_fields[group].annotation
        return f"unknown key {path}: {nearest(location[-1], section.model_fields)}"
    if problem["type"] == "value_error":
        return f"{path}: {problem['ctx']['error']}"
    return f"{path}: {problem['msg']}, got {problem['input']!r}"
