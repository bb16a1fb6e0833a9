"""The parts of a training, made as the configuration says: network, optimizer, forward pass, loaders."""

import logging
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cifar_ignite.augment import create_augment, normalize, to_float
from cifar_ignite.config import AugmentConfig, Config, InputError, OptimizerConfig, RunFailedError
from cifar_ignite.data import NUM_CLASSES, Images
from cifar_ignite.engines import Forward, create_forward, pays_to_compile, warm_up
from cifar_ignite.loader import INITIAL_WEIGHTS, EvalLoader, TrainLoader, derive_seed, part_of
from cifar_ignite.models import create_model
from cifar_ignite.muon import Muon

logger = logging.getLogger(__name__)


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The configured model with initial weights drawn from the seed, in channels_last on the device."""
    torch.manual_seed(derive_seed(config.seed, INITIAL_WEIGHTS))
    model = create_model(num_classes=NUM_CLASSES, **config.model.model_dump())
    if config.train.drop_path_ramp and not any(isinstance(module, StochasticDepth) for module in model.modules()):
        raise InputError(f"train.drop_path_ramp: {config.model.name} has no stochastic depth to lower; set it to 0")
    if config.train.sync_batch_norm and device.type == "cpu" and idist.get_world_size() > 1:
        raise InputError("train.sync_batch_norm: works between GPUs only; set it to false")
    if config.optimizer.name == "muon" and not find_filters(model):
        raise InputError(f"optimizer.name: {config.model.name} has no convolution without a bias for Muon; take sgd")
    return model.to(device).to(memory_format=torch.channels_last)


@torch.no_grad()
def whiten_stem(model: nn.Module, images: Tensor, config: AugmentConfig) -> None:
    """Make the first convolution's filters the principal components of what they see, and freeze them there.

    Patch whitening (Page, 2019, "How to train your ResNet 8: Bag of tricks"), each component beside its negative, as
    a ReLU shows only one of them (Jordan, 2024, arXiv:2404.00498, section 3.2): the outputs are uncorrelated but for
    that. There, filters are also scaled to an output variance of 1; here that is left to the BatchNorm behind them.

    Args:
        model: whose first convolution is the stem.
        images: to train on, uint8 (N, 3, H, W); the first 2,000 are looked at.
        config: for the normalisation.

    Raises:
        InputError: the model has no convolution of images, or it has more filters than twice the values they see.
    """
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.bias is not None or stem.weight[0].numel() * 2 < stem.out_channels:
        raise InputError("train.whiten_stem: the model has no stem that can be whitened; set it to false")
    seen = normalize(to_float(images[:2_000]), config.mean, config.std)
    patches = F.unfold(seen, stem.kernel_size).transpose(0, 1).flatten(1)
    components = torch.linalg.eigh(patches @ patches.T).eigenvectors.T.flip(0)[: (stem.out_channels + 1) // 2]
    stem.weight.copy_(torch.cat([components, -components])[: stem.out_channels].view_as(stem.weight))
    stem.weight.requires_grad_(False)


def find_filters(model: nn.Module) -> list[Tensor]:
    """The weights of convolutions that BatchNorm follows, known by their want of a bias; not what is frozen."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    weights = (convolution.weight for convolution in convolutions if convolution.bias is None)
    return [weight for weight in weights if weight.requires_grad]


def create_optimizer(config: OptimizerConfig, model: nn.Module, precision: torch.dtype) -> torch.optim.SGD:
    """SGD on two groups of parameters: weights, and all that has one dimension; a third one, of filters, for Muon.

    Fused, so that an update can be skipped on the device (see handlers.attach_gradient_guard).
    """
    filters = find_filters(model) if config.name == "muon" else []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if all(parameter is not one for one in filters)]
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {
            "params": [parameter for parameter in rest if parameter.ndim <= 1],
            "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0,
        },
    ]
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, fused=True, **options)
    else:
        dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.float32
        lr, momentum = config.muon_lr, config.muon_momentum
        optimizer = Muon(groups, filters, filter_lr=lr, filter_momentum=momentum, dtype=dtype, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            # SGD would make it at its first update, and leave it as the memory was if that update is skipped.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def create_training_forward(
    config: Config, model: nn.Module, loader: TrainLoader, precision: torch.dtype, iterations: int
) -> Forward:
    """The forward pass of training, compiled if the configuration wants it.

    Raises:
        RunFailedError: compilation fails, and was asked for (compile=on).
    """
    device, part = loader.images.device, part_of(loader.batch_size, loader.rank, loader.processes)
    size = part.stop - part.start
    eager = create_forward(model, device, precision)
    if loader.batch_size > len(loader.images) or not should_compile(config, device, iterations):
        return eager
    forward = create_forward(model, device, precision, compiled_batch=size)
    images = torch.zeros(size, *loader.images.shape[1:], device=device).contiguous(memory_format=torch.channels_last)
    try:
        logger.info("compiled in %.0f s", warm_up(model, forward, images))
    except RunFailedError as error:
        if config.compile == "on":
            raise
        logger.warning("%s; going on without it", error)
        return eager
    return forward


def should_compile(config: Config, device: torch.device, iterations: int) -> bool:
    """Whether it is asked for or pays; each change of a drop probability would be compiled anew.

    SyncBatchNorm talks to other processes, which may compile longer or not at all.
    """
    options = config.train
    return pays_to_compile(config.compile, device, iterations) and not (
        options.drop_path_ramp or options.sync_batch_norm
    )


def create_loaders(
    config: Config, images: Sequence[Images], device: torch.device
) -> tuple[TrainLoader, EvalLoader | None]:
    """Put the images to train on and those for validation on the device; no validation loader if there are none.

    Raises:
        InputError: there are more processes than images in a batch.
    """
    train_images, val_images = images
    rank, count, batch_size = idist.get_rank(), idist.get_world_size(), config.data.batch_size
    if count > batch_size:
        raise InputError(f"data.batch_size: {batch_size} images cannot be shared by {count} processes")

    def on_device(part: Images) -> tuple[Tensor, Tensor]:
        assert part.labels is not None, "training images have labels"
        return part.images.to(device), part.labels.to(device)

    train_loader = TrainLoader(
        *on_device(train_images),
        batch_size=batch_size,
        seed=config.seed,
        augment=create_augment(config.augment, NUM_CLASSES, config.train.epochs),
        rank=rank,
        processes=count,
    )
    if not len(val_images.images):
        return train_loader, None
    mean, std = config.augment.mean, config.augment.std
    return train_loader, EvalLoader(
        *on_device(val_images), batch_size=batch_size, mean=mean, std=std, rank=rank, processes=count
    )
