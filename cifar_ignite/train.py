"""Puts the parts together: configuration in, run folder out."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Events
from torch import nn
from torch.amp import GradScaler

from cifar_ignite import handlers, processes
from cifar_ignite.building import (
    build_model,
    create_loaders,
    create_optimizer,
    create_training_forward,
    whiten_stem,
)
from cifar_ignite.checkpoints import (
    RunRecord,
    best_model_path,
    create_unique_dir,
    newest,
    publish_best,
    replacing,
    sweep_temporaries,
)
from cifar_ignite.config import Config, InputError, RunFailedError, flatten, telling_of_memory
from cifar_ignite.data import Images, load_images, split_images
from cifar_ignite.engines import (
    LossFn,
    create_evaluator,
    create_forward,
    create_trainer,
    select_device,
    select_precision,
    weigh,
)
from cifar_ignite.launch import Launch, read_launch
from cifar_ignite.loader import EvalLoader, TrainLoader
from cifar_ignite.reporting import attach_progress, attach_reports, format_seconds
from cifar_ignite.resume import Resumed, find_resumed
from cifar_ignite.saving import PatientSaver, attach_best_model, attach_checkpoints
from cifar_ignite.signals import StopFlag, Stopped, StopRequested, stop_flag

logger = logging.getLogger(__name__)


def train(
    config: Config, resume: str | None = None, overrides: Sequence[str] = (), allow_changes: bool = False
) -> Path:
    """Train one model, or go on training it; under torchrun or SLURM, together with the other processes of the job.

    Args:
        config: the whole run.
        resume: "latest" continues the newest run of the experiment; a path continues a run folder or a training state.
            A continued run keeps its own configuration.
        overrides: `section.key=value` in which the continuation is to differ from the run's own configuration.
        allow_changes: continue under `config`, also if that changes what is trained.

    Returns:
        The run folder.

    Raises:
        InputError: data, model or checkpoint do not fit; nothing was written.
        RunFailedError: the training diverged, or checkpoints can no longer be written, or a signal asked to stop
            (`Stopped`); the newest checkpoints are whole.
    """
    launch = read_launch()
    if launch and launch.restarts and (known := processes.remembered_run()):
        logger.info("started anew by torchrun (%d): going on with %s", launch.restarts, known)
        resume = known
    resumed, refused = None, None
    try:
        resumed = find_resumed(config, resume, overrides, allow_changes) if resume else None
    except InputError as error:
        refused = error
    config = resumed.config if resumed else config
    device = select_device(config.device)
    with processes.joined(device):
        if refused:  # only now, so that the other processes need not wait for this one
            raise refused
        if resumed and resumed.is_finished:
            logger.info("already complete after epoch %d: nothing to do for %s", resumed.epoch, resumed.path)
            return resumed.run_dir or config.output_dir
        model = build_model(config, device)
        images = processes.load_once(lambda: split_images(config.data, load_images(config.data, train=True)))
        loaders = create_loaders(config, images, device)
        if config.train.whiten_stem:
            whiten_stem(model, loaders[0].images, config.augment)
        if resumed:
            resumed.check_model(model)
            resumed.check_length(len(loaders[0]), allow_changes)
            resumed.check_processes_agree()
        # Until here a signal ends the process at once: there is nothing to save.
        with stop_flag(processes.agree if idist.get_world_size() > 1 else None) as flag:
            run_dir = open_shared_run_dir(config, resumed.run_dir if resumed else None, launch)
            with log_file(run_dir / "logs" / "training.log"), naming_newest_state(run_dir / "checkpoints"):
                log_start(config, model, images, run_dir, resumed)
                record = RunRecord(run_dir.name, config.model_dump(mode="json"), list(images[0].class_names))
                fit(config, model, record, loaders, run_dir, resumed, flag)
    return run_dir


def fit(
    config: Config,
    model: nn.Module,
    record: RunRecord,
    loaders: tuple[TrainLoader, EvalLoader | None],
    run_dir: Path,
    resumed: Resumed | None,
    flag: StopFlag,
) -> None:
    """Attach every behaviour in order, take over the saved state if there is one, and run to the end."""
    train_loader, val_loader = loaders
    device, options, checkpoints = train_loader.images.device, config.train, run_dir / "checkpoints"
    precision = select_precision(config.precision, device)
    scaler = GradScaler(device.type, enabled=precision == torch.float16)
    optimizer = create_optimizer(config.optimizer, model, precision)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    iterations = options.epochs * len(train_loader)
    forward = create_training_forward(config, model, train_loader, precision, iterations)
    several, is_first = idist.get_world_size() > 1, idist.get_rank() == 0
    step_loss: LossFn = loss_fn
    if several:
        forward = processes.wrap(model, forward, device, sync_batch_norm=options.sync_batch_norm)
        step_loss = weigh(loss_fn, lambda: train_loader.weight)
    trainer = create_trainer(model, forward, optimizer, step_loss, scaler)
    schedule = handlers.attach_schedule(trainer, optimizer, config.schedule, iterations)
    # A GPU runs ahead of the host, and each look at its tensors would make them wait for each other.
    check_every = 1 if device.type == "cpu" else options.log_every
    # Several processes look at clocks and signals together. One on its own looks each time: it costs nothing.
    agree, look_every = (processes.agree, check_every) if several else (int, 1)
    if options.drop_path_ramp:
        handlers.attach_drop_path_ramp(trainer, model, options.drop_path_ramp, options.epochs)
    check = handlers.attach_gradient_guard(trainer, model, optimizer, scaler, options.clip_grad_norm, check_every)
    timer = handlers.EpochTimer(trainer)  # stops after the guard's look, which waits for what a GPU has still to do
    metrics = handlers.attach_metrics(trainer, loss_fn, device)
    state = {"model": model, "optimizer": optimizer, "trainer": trainer, "record": record, "timer": timer}
    if scaler.is_enabled():
        state["scaler"] = scaler
    judged = model
    if options.ema_decay:
        judged = state["ema"] = handlers.attach_ema(trainer, model, options.ema_decay)
    if several:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: processes.copy_buffers(judged))
    if is_first:
        attach_progress(trainer, metrics, optimizer, options.log_every)

    evaluator = create_evaluator(judged, create_forward(judged, device, precision)) if val_loader else None
    if evaluator and val_loader:
        handlers.attach_metrics(evaluator, F.cross_entropy, device)
        handlers.attach_validation(trainer, evaluator, val_loader, optimizer)
    handlers.attach_history(trainer, evaluator, optimizer, record, len(train_loader.images), timer)
    saver = PatientSaver(checkpoints, options.save_failures_allowed)
    target = best_model_path(config.output_dir, config.experiment, selected=evaluator is not None)

    def publish() -> str:
        try:
            return publish_best(checkpoints / str(best.last_checkpoint), target)
        except InputError as error:  # the run's own best file is gone
            return f"nothing: {error}"

    best = attach_best_model(trainer, judged, record, saver, publish, selected=evaluator is not None)
    if evaluator:
        state["best"] = best
        if options.patience:
            state["early_stopping"] = handlers.attach_early_stopping(trainer, record, options.patience)
    if is_first:
        attach_reports(trainer, record, run_dir / "logs", options.checkpoint_every)
    if resumed:
        resumed.load_into(state)
        train_loader.iteration = trainer.state.iteration
        handlers.set_schedule(schedule, trainer.state.iteration)
    state["metrics"] = metrics
    if several:
        state["metrics"], check = processes.attach_summing(trainer, metrics, check)
    every, every_seconds = options.checkpoint_every, options.save_every_seconds
    save = attach_checkpoints(trainer, state, saver, every, every_seconds, check, agree, look_every)
    handlers.attach_stop(trainer, evaluator, flag, look_every)

    started = time.monotonic()
    try:
        if resumed:
            resumed.finish_epoch(trainer, metrics)
        # Ignite would begin a finished training anew.
        done = record.epoch == options.epochs or trainer.should_terminate
        trainer.fire_event(Events.COMPLETED) if done else trainer.run(train_loader, max_epochs=options.epochs)
    except StopRequested:
        saver.be_strict()
        save()
        raise Stopped(flag, record.epoch, trainer.state.iteration) from None
    if agree(saver.failures):
        saver.be_strict()
        save()
    if is_first:
        log_end(record, run_dir, checkpoints / str(best.last_checkpoint), publish(), time.monotonic() - started)


# --- The folder ---------------------------------------------------------------------------------------------------


def open_shared_run_dir(config: Config, run_dir: Path | None, launch: Launch | None) -> Path:
    """The folder of a run, opened by the first of its processes and known to all."""
    if launch is None or launch.rank == 0:
        run_dir = open_run_dir(config, run_dir)
        if launch:
            processes.remember_run(run_dir)
    return Path(processes.same_for_all(str(run_dir)))


def open_run_dir(config: Config, run_dir: Path | None) -> Path:
    """The folder of a run that is continued, or a new one named by the time; with config.json in it."""
    runs = config.output_dir / "training_runs"
    try:
        run_dir = run_dir or create_unique_dir(runs, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        for part in (run_dir, run_dir / "checkpoints", run_dir / "logs"):
            part.mkdir(exist_ok=True)
            sweep_temporaries(part)
        # Another run may be writing there now.
        sweep_temporaries(config.output_dir / "best_models", older_than=3600)
        with replacing(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {run_dir or runs}: {error.strerror}") from None
    return run_dir


# --- Telling ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Send the package's messages to a file too, with the time; if that fails, to the terminal alone.

    Of several processes, only the first one writes.
    """
    if idist.get_rank():
        yield
        return
    package = logging.getLogger("cifar_ignite")
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        logger.warning("cannot write %s (%s); training goes on without it", path, error)
        yield
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    # A full disk is told once by the files that matter; logging would print a traceback for each line.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


@contextlib.contextmanager
def naming_newest_state(checkpoints: Path) -> Iterator[None]:
    """Add to the message of a failed run from where it can be continued."""
    try:
        with processes.noticing_lost_processes(), telling_of_memory():
            yield
    except Stopped:
        raise
    except RunFailedError as error:
        found = newest(checkpoints.glob("latest_*.pt"))
        error.args = (f"{error}; newest state before it: {found or 'none yet'}",)
        raise


def log_start(
    config: Config, model: nn.Module, images: Sequence[Images], run_dir: Path, resumed: Resumed | None
) -> None:
    """The configuration, a line a group; the model and its size; the device; where it all goes."""
    tree = config.model_dump(mode="json")
    top = {key: tree.pop(key) for key in list(tree) if not isinstance(tree[key], dict)}
    for group, values in {"run": top, **tree}.items():
        logger.info(
            "%-9s  %s", group, "  ".join(f"{key}={json.dumps(value)}" for key, value in flatten(values).items())
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = next(model.parameters()).device
    precision = str(select_precision(config.precision, device)).removeprefix("torch.")
    where = f"{count} processes, each on {device}" if (count := idist.get_world_size()) > 1 else device
    logger.info("%s with %s parameters on %s in %s", config.model.name, f"{parameters:,}", where, precision)
    logger.info("%d images to train on, %d held out for validation", *(len(part.images) for part in images))
    logger.info("run folder %s", run_dir)
    if resumed:
        logger.info(resumed.describe())


def log_end(record: RunRecord, run_dir: Path, best_path: Path, published: str, seconds: float) -> None:
    """What came out, and where everything lies."""
    logger.info("done after epoch %d, in %s", record.epoch, format_seconds(seconds))
    if row := record.best:
        logger.info("best validation accuracy %.2f%% (epoch %d)", 100 * (row["val_acc"] or 0), row["epoch"])
    logger.info("model      %s", best_path)
    if row and best_path.name != f"best_epoch_{row['epoch']:04d}.pth":
        logger.warning("that is not the model of the best epoch, which is not in its folder")
    logger.info("published  %s", published)
    logger.info("logs       %s (training.log, metrics.csv, tensorboard, figures)", run_dir / "logs")
