"""Puts the parts together: configuration in, run folder out."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.handlers import Checkpoint
from torch import Tensor, nn

from cifar_ignite import handlers
from cifar_ignite.augment import create_augment
from cifar_ignite.checkpoints import (
    RunRecord,
    best_model_path,
    create_unique_dir,
    load_checkpoint,
    newest,
    publish_best,
    write_checkpoint,
)
from cifar_ignite.config import Config, InputError, flatten
from cifar_ignite.data import NUM_CLASSES, Images, load_images, split_validation
from cifar_ignite.engines import create_evaluator, create_trainer, select_device
from cifar_ignite.loader import INITIAL_WEIGHTS, EvalLoader, TrainLoader, derive_seed
from cifar_ignite.models import create_model

# What may differ between a run and its continuation: it changes where and how things run, not what is trained.
FREE_TO_CHANGE = {"output_dir", "device", "data.root", "train.checkpoint_every", "train.log_every"}

logger = logging.getLogger(__name__)


def train(config: Config, resume: str | None = None) -> Path:
    """Train one model, or go on training it.

    Args:
        config: the whole run.
        resume: "latest" continues the newest run of the experiment; a path continues from that training state.

    Returns:
        The run folder.

    Raises:
        InputError: data, model or checkpoint do not fit; nothing was written.
        NonFiniteError: the training diverged; the newest checkpoints are those before it.
    """
    state_path = find_state(config, resume) if resume else None
    saved = load_state(state_path, config) if state_path else None
    if state_path and saved and is_finished(saved, config):
        logger.info("already complete after epoch %d: nothing to do for %s", saved["record"].epoch, state_path)
        return state_path.parent.parent
    device = select_device(config.device)
    model = build_model(config, device)
    images = load_images(config.data, train=True)
    loaders = create_loaders(config, images, device)
    run_dir = state_path.parent.parent if state_path else create_run_dir(config)
    with logging_to(logging.FileHandler(run_dir / "logs" / "training.log", encoding="utf-8")):
        log_start(config, model, images, run_dir, device, state_path)
        record = RunRecord(config.model_dump(mode="json"), list(images.class_names))
        fit(config, model, record, loaders, run_dir, saved)
    return run_dir


def fit(
    config: Config,
    model: nn.Module,
    record: RunRecord,
    loaders: tuple[TrainLoader, EvalLoader | None],
    run_dir: Path,
    saved: dict[str, Any] | None,
) -> None:
    """Attach every behaviour in order, load the saved state if there is one, and run to the end."""
    train_loader, val_loader = loaders
    device = train_loader.images.device
    checkpoints, logs = run_dir / "checkpoints", run_dir / "logs"
    best_target = best_model_path(config.output_dir, config.experiment, selected=val_loader is not None)
    published = [""]

    def publish(path: Path) -> None:
        published[0] = publish_best(path, record, best_target)

    # Fused, so that an update can be skipped on the device (see attach_gradient_guard).
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    trainer = create_trainer(model, optimizer, loss_fn)
    iterations = config.train.epochs * len(train_loader)
    schedule = handlers.attach_schedule(trainer, optimizer, config.schedule, config.optimizer.lr, iterations)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "trainer": trainer,
        "record": record,
    }
    # A GPU runs ahead of the host, and each look at its tensors would make them wait for each other.
    check_every = 1 if device.type == "cpu" else config.train.log_every
    handlers.attach_gradient_guard(trainer, model, optimizer, config.train.clip_grad_norm, check_every)
    metrics = handlers.attach_metrics(trainer, loss_fn, device)
    handlers.attach_progress_bar(trainer, metrics, optimizer, config.train.log_every)
    evaluator: Engine | None = None
    if val_loader:
        evaluator = create_evaluator(model)
        handlers.attach_metrics(evaluator, F.cross_entropy, device)
        handlers.attach_validation(trainer, evaluator, val_loader)
    handlers.attach_history(trainer, evaluator, optimizer, record, len(train_loader.images), logs / "metrics.csv")
    if val_loader:
        state["best"] = handlers.attach_best_model(trainer, model, record, checkpoints, publish)
        if config.train.patience:
            state["early_stopping"] = handlers.attach_early_stopping(trainer, record, config.train.patience)
    handlers.attach_epoch_line(trainer, record)
    handlers.attach_tensorboard(trainer, evaluator, optimizer, logs / "tensorboard")
    handlers.attach_figures(trainer, record, logs / "figures", config.train.checkpoint_every)
    if saved:
        Checkpoint.load_objects(state, saved | {"record": saved["record"].state_dict()})
        train_loader.iteration = trainer.state.iteration
    handlers.attach_checkpoints(trainer, state, checkpoints, config.train.checkpoint_every)

    started = time.monotonic()
    trainer.run(train_loader, max_epochs=config.train.epochs)
    best_path = (
        checkpoints / str(state["best"].last_checkpoint) if val_loader else checkpoints / "last_val_acc_none.pth"
    )
    if not val_loader:
        write_checkpoint(best_path, {"model": model.state_dict(), "record": record.state_dict()})
        publish(best_path)
    log_end(record, run_dir, best_path, published[0], time.monotonic() - started)


# --- Building -----------------------------------------------------------------------------------------------------


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The configured model with initial weights drawn from the seed, in channels_last on the device."""
    torch.manual_seed(derive_seed(config.seed, INITIAL_WEIGHTS))
    model = create_model(num_classes=NUM_CLASSES, **config.model.model_dump())
    return model.to(device).to(memory_format=torch.channels_last)


def create_loaders(config: Config, images: Images, device: torch.device) -> tuple[TrainLoader, EvalLoader | None]:
    """Split the training images and put them on the device; no validation loader if nothing is held out."""
    labels = images.labels
    assert labels is not None, "training images have labels"
    train_rows, val_rows = split_validation(labels, config.data.validation, config.data.split_seed)

    def on_device(rows: Tensor) -> tuple[Tensor, Tensor]:
        return images.images[rows].to(device), labels[rows].to(device)

    train_loader = TrainLoader(
        *on_device(train_rows),
        batch_size=config.data.batch_size,
        seed=config.seed,
        augment=create_augment(config.augment, NUM_CLASSES),
    )
    if not len(val_rows):
        return train_loader, None
    mean, std = config.augment.mean, config.augment.std
    return train_loader, EvalLoader(*on_device(val_rows), batch_size=config.data.batch_size, mean=mean, std=std)


def create_run_dir(config: Config) -> Path:
    """A new folder named by the time, with config.json in it."""
    runs = config.output_dir / "training_runs"
    try:
        run_dir = create_unique_dir(runs, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        for folder in ("checkpoints", "logs"):
            (run_dir / folder).mkdir()
        (run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {runs}: {error.strerror}") from None
    return run_dir


# --- Resuming -----------------------------------------------------------------------------------------------------


def find_state(config: Config, resume: str) -> Path:
    """The training state that `--resume` means: "latest", a run folder, or a file.

    Raises:
        InputError: there is none.
    """
    if resume != "latest":
        path = Path(resume)
        found = newest((path / "checkpoints").glob("latest_*.pt")) if path.is_dir() else path
        if found is None:
            raise InputError(f"{path}: no training state (checkpoints/latest_*.pt) in this folder")
        return found
    runs = config.output_dir / "training_runs"
    states = [
        path
        for run_config in runs.glob("*/config.json")
        if _experiment(run_config) == config.experiment
        for path in (run_config.parent / "checkpoints").glob("latest_*.pt")
    ]
    found = newest(states)
    if found is None:
        raise InputError(f"{runs}: no run of experiment {config.experiment!r} to resume; start one without RESUME")
    return found


def _experiment(run_config: Path) -> Any:
    try:
        return json.loads(run_config.read_text())["experiment"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_state(path: Path, config: Config) -> dict[str, Any]:
    """Read a training state and make sure that it belongs to `config`.

    Raises:
        InputError: not a training state, or of another configuration (the keys that differ are named).
    """
    saved = load_checkpoint(path)
    if "trainer" not in saved:
        raise InputError(f"{path}: holds a model only, not a training state; resume from a latest_*.pt or epoch_*.pt")
    then, now = flatten(saved["record"].config), flatten(config.model_dump(mode="json"))
    if changed := [key for key in now if key not in FREE_TO_CHANGE and then.get(key) != now[key]]:
        differences = ", ".join(f"{key} was {json.dumps(then.get(key))}, now {json.dumps(now[key])}" for key in changed)
        raise InputError(f"{path}: cannot be resumed under another configuration: {differences}")
    return saved


def is_finished(saved: dict[str, Any], config: Config) -> bool:
    """Whether all epochs are done, or early stopping had stopped the run."""
    stopped = "early_stopping" in saved and saved["early_stopping"]["counter"] >= (config.train.patience or 0)
    return saved["record"].epoch >= config.train.epochs or stopped


# --- Telling ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Send the package's messages to `handler` too: bare to the terminal, with the time to a file."""
    package = logging.getLogger("cifar_ignite")
    stamp = "%(asctime)s " if isinstance(handler, logging.FileHandler) else ""
    handler.setFormatter(logging.Formatter(f"{stamp}%(message)s"))
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def log_start(
    config: Config, model: nn.Module, images: Images, run_dir: Path, device: torch.device, state_path: Path | None
) -> None:
    """The configuration, a line a group; the model and its size; the device; where it all goes."""
    tree = config.model_dump(mode="json")
    top = {key: tree.pop(key) for key in list(tree) if not isinstance(tree[key], dict)}
    for group, values in {"run": top, **tree}.items():
        logger.info(
            "%-9s  %s", group, "  ".join(f"{key}={json.dumps(value)}" for key, value in flatten(values).items())
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s with %s parameters on %s", config.model.name, f"{parameters:,}", device)
    held_out = config.data.validation
    logger.info("%d images to train on, %d held out for validation", len(images.images) - held_out, held_out)
    logger.info("%s %s", f"resuming {state_path} in" if state_path else "run folder", run_dir)


def log_end(record: RunRecord, run_dir: Path, best_path: Path, published: str, seconds: float) -> None:
    """What came out, and where everything lies."""
    logger.info("done after epoch %d, in %s", record.epoch, handlers.format_seconds(seconds))
    if record.val_acc is not None:
        row = max(record.history, key=lambda row: row["val_acc"])
        logger.info("best validation accuracy %.2f%% (epoch %d)", 100 * row["val_acc"], row["epoch"])
    logger.info("model      %s", best_path)
    if published:
        logger.info("published  %s", published)
    logger.info("logs       %s (training.log, metrics.csv, tensorboard, figures)", run_dir / "logs")
