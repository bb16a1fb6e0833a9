"""The train command: a configuration in, a run directory out."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
import torch
from torch import nn

from cifar_ignite.checkpointing.best_model import run_best_model
from cifar_ignite.checkpointing.full_checkpoints import full_checkpoints
from cifar_ignite.checkpointing.resume import ResumeState, resolve_resume
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config
from cifar_ignite.config_io import parse_config
from cifar_ignite.data.dataset import ImageDataset, train_val_split
from cifar_ignite.data.loaders import create_loaders
from cifar_ignite.data.registry import load_dataset_on_ranks
from cifar_ignite.data.resolving import resolve_config
from cifar_ignite.distributed.collectives import broadcast_from_rank0, check_same_images
from cifar_ignite.distributed.env import DistEnv, dist_env_from_environ
from cifar_ignite.distributed.process_group import (
    DistributedContext,
    distributed_context,
    publish_run_dir,
    restarted_run_dir,
    translate_connection_errors,
)
from cifar_ignite.errors import (
    InputError,
    TrainingError,
    TrainingInterrupted,
    translate_missing_operators,
    translate_oom_errors,
)
from cifar_ignite.files import (
    atomic_write,
    create_unique_dir,
    lock_file,
    remove_stale_temp_files,
    timestamp,
    translate_write_errors,
    write_text,
)
from cifar_ignite.training.device import (
    enable_deterministic_algorithms,
    precision_name,
    select_device,
    set_float32_precision,
)
from cifar_ignite.training.environment import describe_environment, format_environment
from cifar_ignite.training.forward import forget_earlier_runs
from cifar_ignite.training.loggers import history_table, log_config, log_file, log_summary
from cifar_ignite.training.signals import catch_signals
from cifar_ignite.training.state import TrainingState, attach_handlers, create_initial_model, run_training

# Another run may be writing temporary files to best_models/ at the same time.
STALE_AFTER_SECONDS = 3600

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A completed run, the same on all ranks.

    Attributes:
        run_dir: Run directory. For a complete checkpoint that was copied out of one, the directory of the checkpoint.
        best_model: Checkpoint in the run directory with the highest validation accuracy, or of the last epoch of a run
            without validation; None if its file was deleted.
        history: Table of metrics.csv, one row per epoch: epoch (int64, from 1), train_loss, train_acc, val_loss,
            val_acc, lr, seconds and images_per_second (float64). Accuracies are in [0, 1]; val_* are NaN without
            validation.
    """

    run_dir: Path
    best_model: Path | None
    history: pd.DataFrame = field(repr=False)

    @property
    def best_val_acc(self) -> float:
        """Highest validation accuracy, in [0, 1]; NaN without validation."""
        return float(self.history["val_acc"].max())


def train(
    config: Config,
    resume: str | Path | None = None,
    overrides: Sequence[str] = (),
    allow_changes: bool = False,
    attach: Callable[[TrainingState], None] | None = None,
) -> TrainResult:
    """Train a model, or resume a run; under torchrun or SLURM, together with the other processes of the job.

    In the main thread, SIGINT (Ctrl-C, or "interrupt kernel" in a notebook), SIGTERM and SIGUSR1 stop the run once its
    state is saved; their handlers are restored at the end. Torch's global generators are seeded for each iteration.

    Args:
        config: Configuration of the run, see `load_config`.
        resume: "latest" for the latest run of the experiment, or the path of a run directory or a full checkpoint. A
            resumed run keeps its own configuration.
        overrides: Strings `section.key=value`, applied to `config`, or to the resumed run's own configuration.
        allow_changes: Whether to resume with `config` itself, even if that changes what is trained.
        attach: Function that attaches handlers of your own, for example to `state.trainer`; called on all ranks once
            everything else is attached and restored.

    Returns:
        Run directory, best model and history; also if the resumed run is already complete.

    Raises:
        InputError: If the configuration, dataset or checkpoint is invalid; nothing was written.
        TrainingError: If training diverged, checkpoints or the best model cannot be written, or a signal was received
            (`TrainingInterrupted`); the latest checkpoints are valid.
    """
    env = dist_env_from_environ()
    if run_dir := restarted_run_dir(env):
        logger.info("restarted by torchrun (%d): resuming %s", env.restart_count, run_dir)
        resume = run_dir
    resume_state, resume_error = None, None
    config = parse_config(config.model_dump(mode="json"), "configuration", overrides)
    try:
        resume_state = resolve_resume(config, str(resume), overrides, allow_changes) if resume is not None else None
    except InputError as error:
        resume_error = error
    config = resume_state.config if resume_state else config
    device = select_device(config.device)
    enable_deterministic_algorithms()
    set_float32_precision(config.precision)
    forget_earlier_runs(device)
    with distributed_context(device, env) as context:
        if resume_error:  # raised once the ranks have joined, so that no other rank waits for this one
            raise resume_error
        if resume_state and resume_state.is_complete:
            logger.info("already complete after epoch %d: nothing to do for %s", resume_state.epoch, resume_state.path)
            directory = resume_state.run_dir or Path(str(resume_state.path)).parent
            history = history_table(resume_state.saved["record"].history)
            return TrainResult(directory, run_best_model(directory), history)
        return _train(config, resume_state, context, attach)


def _train(
    config: Config,
    resume: ResumeState | None,
    context: DistributedContext,
    attach: Callable[[TrainingState], None] | None,
) -> TrainResult:
    """Train on all ranks; parameters and errors are those of `train`."""
    device = select_device(config.device)
    # An invalid model is refused before the dataset is downloaded, although only the dataset has the number of classes.
    create_initial_model(config, num_classes=1, device=device)
    train_set, val_set = load_splits(config, device)
    class_names, fingerprints = list(train_set.class_names), (train_set.fingerprint, val_set.fingerprint)
    check_same_images(" ".join(fingerprints), context.cpu_group)
    config = resolve_config(config, train_set, val_set)
    model = create_initial_model(config, train_set.num_classes, device)
    loaders = create_loaders(config, train_set, val_set, device)
    if resume:
        resume.check_compatible(model, len(loaders[0]))
        resume.check_same_data(class_names, *fingerprints)
    # A signal before this line exits the process at once: there is nothing to save.
    with catch_signals(context) as flag, contextlib.ExitStack() as locks:
        run_dir = open_run_dir(config, class_names, resume.run_dir if resume else None, context.env, locks)
        with log_file(run_dir / "logs" / "training.log"), append_latest_checkpoint(run_dir):
            log_start(config, model, (train_set, val_set), run_dir, resume)
            tree = config.model_dump(mode="json")
            record = RunRecord(
                run_dir.name, tree, class_names, train_fingerprint=fingerprints[0], val_fingerprint=fingerprints[1]
            )
            state = TrainingState(config, model, loaders, record, run_dir / "checkpoints")
            checkpoints = attach_handlers(state, run_dir / "logs", flag, context.cpu_group)
            if resume:
                state.restore(resume)
            record_environment(state, run_dir)
            if attach:
                attach(state)
            started = time.monotonic()
            run_training(state, checkpoints, resume, flag, context.cpu_group)
            log_summary(record, state.best.path, run_dir / "logs", time.monotonic() - started)
            logger.info("best model  %s", state.best.promote())
            best_model = broadcast_from_rank0(lambda: str(run_best_model(run_dir) or ""))
    return TrainResult(run_dir, Path(best_model) if best_model else None, history_table(record.history))


def load_splits(config: Config, device: torch.device) -> tuple[ImageDataset, ImageDataset]:
    """Load the training set of the configured dataset; return the images for training and for validation."""
    dataset = load_dataset_on_ranks(config.data, train=True, device=device)
    return train_val_split(dataset, config.data.val_size, config.data.split_seed)


# --- The run directory --------------------------------------------------------------------------------------------


def open_run_dir(
    config: Config, class_names: list[str], run_dir: Path | None, env: DistEnv, locks: contextlib.ExitStack
) -> Path:
    """Return the run directory to all ranks, created or cleaned by rank 0, and locked until `locks` are closed.

    Args:
        config: Resolved configuration, written to config.json.
        class_names: Names in label order, written to classes.json.
        run_dir: Directory of a resumed run; None creates one named by the time.
        env: Place of this process.
        locks: Stack that closes when the run ends.

    Raises:
        InputError: If the directory cannot be written, or another process is training in it.
    """

    def open_on_rank0() -> str:
        opened = _create_or_clean(config, run_dir, locks)
        write_json(opened / "config.json", config.model_dump(mode="json"))
        write_json(opened / "classes.json", class_names)
        publish_run_dir(opened, env)
        return str(opened)

    return Path(broadcast_from_rank0(open_on_rank0))


def _create_or_clean(config: Config, run_dir: Path | None, locks: contextlib.ExitStack) -> Path:
    runs = config.output_dir / "training_runs"
    with translate_write_errors(run_dir or runs):
        run_dir = run_dir or create_unique_dir(runs, timestamp())
        directories = (run_dir, run_dir / "checkpoints", run_dir / "logs")
        for directory in directories:
            directory.mkdir(exist_ok=True)
        if not locks.enter_context(lock_file(run_dir / "logs" / "training.log")):
            raise InputError(f"{run_dir}: another process is training in this directory; stop it before resuming")
        for directory in directories:
            remove_stale_temp_files(directory)
        remove_stale_temp_files(config.output_dir / "best_models", older_than=STALE_AFTER_SECONDS)
    return run_dir


def record_environment(state: TrainingState, run_dir: Path) -> None:
    """Add this environment to the record; log it, and write all environments of the run to environment.json on rank 0.

    Raises:
        InputError: If the file cannot be written.
    """
    environment = describe_environment(state.device, state.config.precision)
    state.record.add_environment(environment, state.trainer.state.iteration)
    logger.info("environment %s", format_environment(environment))
    if idist.get_rank() == 0:
        write_json(run_dir / "environment.json", state.record.environments)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        InputError: If it cannot be written.
    """
    with translate_write_errors(path.parent), atomic_write(path) as temp_path:
        write_text(temp_path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def append_latest_checkpoint(run_dir: Path) -> Iterator[None]:
    """Append to the message of a failed run the checkpoint that it can be resumed from."""
    try:
        with translate_connection_errors(), translate_oom_errors(), translate_missing_operators():
            yield
    except TrainingInterrupted:
        raise
    except TrainingError as error:
        latest = next((path for path in full_checkpoints(run_dir) if path.name.startswith("latest_")), "none yet")
        error.args = (f"{error}; latest checkpoint before it: {latest}",)
        raise


def log_start(
    config: Config,
    model: nn.Module,
    splits: tuple[ImageDataset, ImageDataset],
    run_dir: Path,
    resume: ResumeState | None,
) -> None:
    """Log configuration, model, device, data and paths."""
    log_config(config)
    device = next(model.parameters()).device
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("model       %s, %s parameters", config.model.name, f"{num_parameters:,}")
    logger.info(
        "device      %s, %s, world size %d",
        device,
        precision_name(config.precision, device),
        idist.get_world_size(),
    )
    logger.info("data        %d training images, %d validation images", *(len(split) for split in splits))
    logger.info("run         %s", run_dir)
    if resume:
        logger.info(resume.describe())
