"""The objects of a run: created from the configuration, connected by handlers, saved and restored together."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch import nn
from torch.amp import GradScaler
from torchvision.ops import StochasticDepth

from cifar_ignite.augment.elementwise import memory_format
from cifar_ignite.checkpointing.best_model import BestModelSaver, best_model_path
from cifar_ignite.checkpointing.resume import ResumeState
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.checkpointing.savers import CheckpointSaver, FaultTolerantSaver
from cifar_ignite.config import Config
from cifar_ignite.data.loaders import EvalLoader, TrainLoader
from cifar_ignite.data.seeding import INITIAL_WEIGHTS, derive_seed
from cifar_ignite.distributed.collectives import SyncedMetrics, all_reduce_max, check_sync_batch_norm, wrap_ddp
from cifar_ignite.errors import InputError, first_line
from cifar_ignite.models.registry import create_model
from cifar_ignite.training import handlers, loggers
from cifar_ignite.training.batch_figure import attach_batch_figure
from cifar_ignite.training.calibration import ValidationTemperature, add_tta_temperatures, format_temperatures
from cifar_ignite.training.device import device_check_interval, resolve_amp_dtype
from cifar_ignite.training.engines import create_evaluator, create_trainer, scale_loss
from cifar_ignite.training.forward import create_forward, create_training_forward, uses_cuda_graphs, zero_images
from cifar_ignite.training.lr_schedule import attach_lr_schedule, set_lr_iteration
from cifar_ignite.training.metrics import EpochTimer, attach_metrics
from cifar_ignite.training.optimizers import create_optimizer, find_conv_weights
from cifar_ignite.training.signals import StopFlag, StopRequested

logger = logging.getLogger(__name__)


class TrainingState:
    """Everything that takes part in a training.

    Attributes:
        config: Configuration of the run.
        model: Model that is trained.
        ema_model: Its exponential moving average; None if the configuration has none.
        train_loader: Training batches.
        val_loader: Validation batches; None without validation.
        optimizer: Optimizer of the model.
        scaler: Gradient scaler, enabled for fp16.
        trainer: Engine of training, with metrics "loss" and "accuracy".
        evaluator: Engine of validation, with the same metrics; None without validation.
        temperature: Temperature of the validated model; None without validation.
        lr_schedule: Handler that sets the learning rate.
        metrics: Metrics of `trainer`.
        synced_metrics: Their state over all ranks.
        timer: Timer of the epoch.
        record: Configuration and history of the run.
        saver: Writes checkpoints and counts failures.
        best: Saves the best model.
        early_stopping: Handler that ends the run; None if the configuration has none.
        closing: Closes the files of the run's logs.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        loaders: tuple[TrainLoader, EvalLoader | None],
        record: RunRecord,
        checkpoint_dir: Path,
    ) -> None:
        """
        Args:
            config: Configuration of the run.
            model: Model on the device of the loaders.
            loaders: Training and validation batches.
            record: Record that the run fills.
            checkpoint_dir: Directory of the run's checkpoints.

        Raises:
            TrainingError: If compilation was requested and fails.
        """
        self.config, self.model, self.record = config, model, record
        self.train_loader, self.val_loader = loaders
        self._create_training()
        self._create_validation()
        self.saver = FaultTolerantSaver(checkpoint_dir, config.train.max_save_failures)
        is_selected, patience = self.val_loader is not None, config.train.patience
        target = best_model_path(config.output_dir, config.experiment, selected=is_selected)
        to_save = {"model": self.eval_model} | ({"temperatures": self.temperature} if self.temperature else {})
        self.best = BestModelSaver(to_save, record, self.saver, target, is_selected=is_selected)
        self.closing = contextlib.ExitStack()
        self.early_stopping: EarlyStopping | None = None
        if is_selected and patience:
            self.early_stopping = handlers.create_early_stopping(self.trainer, record, patience)

    def _create_training(self) -> None:
        config, model, loader, device = self.config, self.model, self.train_loader, self.device
        self.scaler = GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        use_cuda_graph = uses_cuda_graphs(config, device)
        self.optimizer = create_optimizer(config.optimizer, model, self.amp_dtype, use_cuda_graph=use_cuda_graph)
        loss_fn = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
        forward = create_training_forward(config, model, loader, self.amp_dtype)
        forward = wrap_ddp(model, forward, zero_images(loader, 2), sync_batch_norm=config.train.sync_batch_norm)
        self.trainer = create_trainer(model, forward, self.optimizer, scale_loss(loss_fn, loader), self.scaler)
        iterations = config.train.epochs * len(loader)
        self.lr_schedule = attach_lr_schedule(self.trainer, self.optimizer, config.schedule, iterations)
        self.metrics = attach_metrics(self.trainer, loss_fn, device)
        self.synced_metrics = SyncedMetrics(self.metrics)
        self.timer = EpochTimer(self.trainer, len(loader.images))
        decay = config.train.ema_decay
        self.ema_model = handlers.attach_ema(self.trainer, model, decay) if decay else None

    def _create_validation(self) -> None:
        self.evaluator: Engine | None = None
        self.temperature: ValidationTemperature | None = None
        if self.val_loader:
            forward = create_forward(self.eval_model, self.device, self.amp_dtype)
            self.evaluator = create_evaluator(self.eval_model, forward)
            attach_metrics(self.evaluator, F.cross_entropy, self.device)
            self.temperature = ValidationTemperature(self.evaluator, self.val_loader)

    @property
    def device(self) -> torch.device:
        return self.train_loader.images.device

    @property
    def amp_dtype(self) -> torch.dtype:
        return resolve_amp_dtype(self.config.precision, self.device)

    @property
    def eval_model(self) -> nn.Module:
        """Model that is validated and saved as the best one."""
        return self.ema_model or self.model

    @property
    def is_done(self) -> bool:
        return self.record.epoch == self.config.train.epochs or bool(self.trainer.should_terminate)

    def calibrate_if_done(self) -> None:
        """At the end of the run, add the temperatures with test-time augmentation to the best model.

        Before the last full checkpoint is saved: a run that is killed meanwhile is resumed from the one before it.
        """
        if not self.is_done:
            return
        if self.val_loader is None:
            logger.info("no validation images: the model gets no temperature, its probabilities are not calibrated")
            return
        try:
            temperatures = add_tta_temperatures(self.best.path, self.eval_model, self.val_loader, self.amp_dtype)
            self.best.try_promote()
            logger.info("temperature %s", format_temperatures(temperatures))
        except (InputError, OSError, RuntimeError) as error:
            logger.warning("no temperatures with test-time augmentation (%s)", first_line(error))

    def to_save(self) -> dict[str, Any]:
        """Return the objects of a full checkpoint, by name."""
        objects = {
            "model": self.model,
            "ema": self.ema_model,
            "optimizer": self.optimizer,
            "scaler": self.scaler if self.scaler.is_enabled() else None,
            "trainer": self.trainer,
            "metrics": self.synced_metrics,
            "timer": self.timer,
            "record": self.record,
            "best": self.best if self.best.is_selected else None,
            "early_stopping": self.early_stopping,
        }
        return {name: object_ for name, object_ in objects.items() if object_ is not None}

    def restore(self, resume: ResumeState) -> None:
        """Load a full checkpoint; the metrics of an incomplete epoch follow when it starts (`resume_mid_epoch`)."""
        resume.restore({name: object_ for name, object_ in self.to_save().items() if name != "metrics"})
        self.train_loader.iteration = self.trainer.state.iteration
        set_lr_iteration(self.lr_schedule, self.trainer.state.iteration)


def create_initial_model(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """Return the model with initial weights drawn from the seed, on the device and in its `memory_format`.

    Raises:
        InputError: If there is no such model, or the configuration requires something that it lacks.
    """
    torch.manual_seed(derive_seed(config.seed, INITIAL_WEIGHTS))
    model = create_model(num_classes=num_classes, **config.model.model_dump())
    has_stochastic_depth = any(isinstance(module, StochasticDepth) for module in model.modules())
    if config.train.drop_path_decay_fraction and not has_stochastic_depth:
        raise InputError(f"train.drop_path_decay_fraction: {config.model.name} has no stochastic depth; set it to 0")
    if config.train.sync_batch_norm:
        check_sync_batch_norm(device)
    if config.optimizer.name == "muon" and not find_conv_weights(model):
        raise InputError(f"optimizer.name: {config.model.name} has no convolution without a bias for Muon; use sgd")
    return model.to(memory_format=memory_format(device)).to(device)


def attach_handlers(state: TrainingState, logs: Path, flag: StopFlag, group: Any) -> CheckpointSaver:
    """Attach every behavior, in the order in which Ignite calls the handlers of one event.

    Args:
        state: Objects of the run.
        logs: Directory of the run's logs.
        flag: Flag that signals set.
        group: Process group for checks that must not wait for a GPU.

    Returns:
        The saver of full checkpoints.
    """
    options, trainer, optimizer = state.config.train, state.trainer, state.optimizer
    check_every = device_check_interval(state.device, options.log_every)
    handlers.attach_drop_path_decay(trainer, state.model, options.drop_path_decay_fraction, options.epochs)
    handlers.attach_peer_check(trainer, check_every, group)
    check_gradient = handlers.attach_grad_clipping(trainer, state.model, optimizer, state.scaler, options)
    handlers.attach_buffer_broadcast(trainer, state.eval_model)
    loggers.attach_progress(trainer, state.metrics, optimizer, options.log_every)
    if state.evaluator and state.val_loader:
        handlers.attach_validation(trainer, state.evaluator, state.val_loader, optimizer)
    if state.temperature:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, state.temperature.gather)
    handlers.attach_history(trainer, state.evaluator, optimizer, state.record, state.timer)
    state.best.attach(trainer)
    if state.early_stopping:
        handlers.attach_early_stopping(trainer, state.early_stopping)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, state.calibrate_if_done)
    figure = logs / "figures" / "train_batch.png"
    attach_batch_figure(trainer, state.train_loader, state.config.augment, state.record.class_names, figure)
    state.closing.callback(loggers.attach_loggers(trainer, state.record, logs, options.checkpoint_every))

    def check() -> None:
        check_gradient()
        state.synced_metrics.gather()

    trainer.add_event_handler(Events.EPOCH_COMPLETED, state.synced_metrics.gather)
    checkpoints = CheckpointSaver(state.saver, state.to_save(), check)
    checkpoints.attach(trainer, options, check_every, group)
    handlers.attach_stop_check(trainer, state.evaluator, flag, check_every)
    return checkpoints


def run_training(
    state: TrainingState, checkpoints: CheckpointSaver, resume: ResumeState | None, flag: StopFlag, group: Any
) -> None:
    """Train to the end, from where `resume` stopped.

    Raises:
        TrainingError: If training diverged, checkpoints can no longer be written, or a signal was received
            (`TrainingInterrupted`); the latest checkpoints are valid.
    """
    trainer = state.trainer
    try:
        if resume:
            resume.resume_mid_epoch(trainer, state.synced_metrics, state.device)
        # Ignite would start a finished training again.
        if state.is_done:
            trainer.fire_event(Events.COMPLETED)
        else:
            trainer.run(state.train_loader, max_epochs=state.config.train.epochs)
    except StopRequested:
        state.saver.disallow_failures()
        checkpoints.save(trainer)
        raise flag.interruption(state.record.epoch, trainer.state.iteration) from None
    finally:
        state.closing.close()
    if all_reduce_max(state.saver.failures, group):
        state.saver.disallow_failures()
        checkpoints.save(trainer)
