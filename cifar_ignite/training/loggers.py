"""Output of a run for people: progress, log lines, training.log, metrics.csv, TensorBoard, figures.

None of it can end a training: a failure is logged once. Only rank 0 writes and logs.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import Metric
from torch.optim import Optimizer
from tqdm import TqdmExperimentalWarning, tqdm

from cifar_ignite.checkpointing.run_record import EpochMetrics, RunRecord
from cifar_ignite.config import Config
from cifar_ignite.config_io import flatten_dict
from cifar_ignite.errors import first_line
from cifar_ignite.files import atomic_write

PROGRESS_LINE_SECONDS = 60

logger = logging.getLogger(__name__)


class WarnOnce:
    """Calls functions that may fail; the first exception of each kind of output is logged, and training continues."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # a plotting library, or a broken installation of one, raises anything
            if what not in self._warned:
                self._warned.add(what)
                logger.warning("cannot write %s (%s); training continues without it", what, first_line(error))


# --- Within an epoch ----------------------------------------------------------------------------------------------


def has_terminal() -> bool:
    """Return whether stderr is a terminal that can show a progress bar."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def create_progress_bar(**options: Any) -> ProgressBar:
    """Return Ignite's progress bar, which is a widget in a notebook with ipywidgets; `options` are those of tqdm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)  # that tqdm has detected the notebook
        return ProgressBar(dynamic_ncols=True, **options)


def attach_progress(trainer: Engine, metrics: dict[str, Metric], optimizer: Optimizer, every: int) -> None:
    """Show the progress of an epoch: as a bar on a terminal or in a notebook, otherwise one line per minute.

    Args:
        trainer: Engine of the training.
        metrics: "loss" and "accuracy" of the current epoch.
        optimizer: Optimizer with the learning rate.
        every: Iterations between updates.
    """
    event = Events.ITERATION_COMPLETED(every=every)
    shown: dict[str, str] = {}

    def update(engine: Engine) -> None:
        # On all ranks: with several, computing a metric sums over them.
        loss, accuracy = (metric.compute() for metric in metrics.values())
        shown.update(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}", lr=f"{optimizer.param_groups[0]['lr']:.2e}")

    trainer.add_event_handler(event, update)
    if idist.get_rank() == 0:
        bar = create_progress_bar()
        if has_terminal() or bar.pbar_cls is not tqdm:
            bar.attach(trainer, output_transform=lambda _: shown, event_name=event)
        else:
            _ProgressLine(shown).attach(trainer, event)


class _ProgressLine:
    """One log line per minute with the progress of the epoch, where there is no terminal for a bar."""

    def __init__(self, shown: dict[str, str]) -> None:
        self.shown = shown
        self.started_at, self.first_iteration, self.logged_at = 0.0, 0, 0.0

    def attach(self, trainer: Engine, event: Any) -> None:
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start)
        trainer.add_event_handler(event, self._log)

    def _start(self, engine: Engine) -> None:
        self.started_at = self.logged_at = time.monotonic()
        self.first_iteration = engine.state.iteration

    def _log(self, engine: Engine) -> None:
        length, now = engine.state.epoch_length or 1, time.monotonic()
        done = (engine.state.iteration - 1) % length + 1
        if now - self.logged_at < PROGRESS_LINE_SECONDS or done == length:
            return
        self.logged_at = now
        remaining = (now - self.started_at) / (engine.state.iteration - self.first_iteration) * (length - done)
        values = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        logger.info("  iteration %d/%d  %s  %s left", done, length, values, format_seconds(remaining))


def format_seconds(seconds: float) -> str:
    """Return "1:02:05" for 3725."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


# --- After each epoch ---------------------------------------------------------------------------------------------


def attach_loggers(trainer: Engine, record: RunRecord, logs: Path, figures_every: int) -> Callable[[], None]:
    """After each epoch, log a line and write metrics.csv, TensorBoard events and, every few epochs, the figures.

    All of them are made from the record's history, so they agree with the checkpoints: a resumed run continues from its
    checkpoint, whatever was written after it.

    Args:
        trainer: Engine of the training.
        record: Record with the history.
        logs: Directory of the run's logs.
        figures_every: Epochs between updates of the figures, which are also drawn at the end.

    Returns:
        Function that closes the files.
    """
    if idist.get_rank() != 0:
        return lambda: None
    warn_once, tensorboard, timing = WarnOnce(), TensorBoardLogger(logs / "tensorboard"), _EpochLine(record)

    def plot() -> None:
        from cifar_ignite.plots import plot_training_curves  # imports matplotlib, which takes seconds

        plot_training_curves(record.history, logs / "figures")

    def log(engine: Engine) -> None:
        logger.info(timing.format(engine.state.max_epochs or 0))
        warn_once("metrics.csv", lambda: write_history(record.history, logs / "metrics.csv"))
        warn_once("TensorBoard events", lambda: tensorboard.write(record.history))
        if is_drawn(engine):
            warn_once("figures", plot)

    def is_drawn(engine: Engine) -> bool:  # before the checkpoint of the epoch
        return record.epoch % figures_every == 0 or record.epoch == engine.state.max_epochs

    def draw_last_epoch(engine: Engine) -> None:
        if not is_drawn(engine):
            warn_once("figures", plot)

    trainer.add_event_handler(Events.STARTED, timing.start)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, log)
    trainer.add_event_handler(Events.COMPLETED, draw_last_epoch)
    return lambda: warn_once("TensorBoard events", tensorboard.close)


class _EpochLine:
    """The log line of an epoch, with an estimate of the remaining time."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.start()

    def start(self) -> None:
        self.started_at, self.first_epoch = time.monotonic(), self.record.epoch

    def format(self, epochs: int) -> str:
        metrics, epoch, val = self.record.history[-1], self.record.epoch, ""
        if metrics["val_acc"] is not None:
            best = " (best)" if metrics is self.record.best else ""
            val = f"  val loss {metrics['val_loss']:.3f} acc {metrics['val_acc']:.2%}{best}"
        seconds_per_epoch = (time.monotonic() - self.started_at) / max(1, epoch - self.first_epoch)
        return (
            f"epoch {epoch:{len(str(epochs))}}/{epochs}  "
            f"train loss {metrics['train_loss']:.3f} acc {metrics['train_acc']:.2%}{val}  lr {metrics['lr']:.2e}  "
            f"{metrics['seconds']:.1f} s  {metrics['images_per_second']:.0f} images/s  "
            f"{format_seconds(seconds_per_epoch * (epochs - epoch))} left"
        )


def history_table(history: list[EpochMetrics]) -> pd.DataFrame:
    """Return the table of metrics.csv: the keys of `EpochMetrics` as columns, NaN without validation."""
    columns = list(EpochMetrics.__annotations__)
    dtypes = dict.fromkeys(columns, "float64") | {"epoch": "int64"}
    return pd.DataFrame(history, columns=pd.Index(columns)).astype(dtypes)


def write_history(history: list[EpochMetrics], path: Path) -> None:
    """Write metrics.csv atomically."""
    with atomic_write(path) as temp_path:
        history_table(history).to_csv(temp_path, index=False, lineterminator="\n")


class TensorBoardLogger:
    """TensorBoard events of the history.

    tensorboardX's SummaryWriter passes events to a thread; if that dies on a full disk, training hangs once its queue
    is full. Its EventsWriter, which is not documented, writes synchronously and raises here (checked with tensorboardX
    2.6). It is imported here, because with another version of protobuf the import fails.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writer: Any = None
        self._written = 0

    def write(self, history: list[EpochMetrics]) -> None:
        """Append the epochs that are not written yet; the first call replaces the directory."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        if self._writer is None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)  # Windows keeps what a viewer has open
            self._writer = EventsWriter(str(self.directory / "events"))
        for metrics in history[self._written :]:
            for name, value in metrics.items():
                if name != "epoch" and value is not None:
                    tag = name.replace("_", "/", 1) if name.startswith(("train", "val")) else name
                    event = Event(step=metrics["epoch"], wall_time=time.time(), summary=scalar(tag, value))
                    self._writer.write_event(event)
            self._written += 1
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


# --- The log of a run ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Write the package's log messages to a file too, with the time; if that fails, only to the terminal.

    Unless the caller has set the level of the package's logger, it is INFO inside the block.
    """
    package = logging.getLogger("cifar_ignite")
    level = package.level
    package.setLevel(level or logging.INFO)
    handler: logging.Handler = logging.NullHandler()
    try:
        if idist.get_rank() == 0:
            handler = logging.FileHandler(path, encoding="utf-8", errors="replace")
    except OSError as error:
        logger.warning("cannot write %s (%s); training continues without it", path, error)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    # A full disk is reported once for the files that matter; logging would print a traceback for each line.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()


def log_config(config: Config) -> None:
    """Log the configuration, one line per section."""
    tree = config.model_dump(mode="json")
    top = {key: tree.pop(key) for key in list(tree) if not isinstance(tree[key], dict)}
    for section, values in {"run": top, **tree}.items():
        pairs = "  ".join(f"{key}={json.dumps(value)}" for key, value in flatten_dict(values).items())
        logger.info("%-9s  %s", section, pairs)


def log_summary(record: RunRecord, best_path: Path, logs: Path, seconds: float) -> None:
    """Log the result of a run and the paths of its files."""
    logger.info("done after epoch %d, in %s", record.epoch, format_seconds(seconds))
    if best := record.best:
        logger.info("best validation accuracy %.2f%% (epoch %d)", 100 * (best["val_acc"] or 0), best["epoch"])
    logger.info("model       %s", best_path)
    if best and best_path.name != f"best_epoch_{best['epoch']:04d}.pth":
        logger.warning("this is not the model of the best epoch, whose file is missing")
    logger.info("logs        %s (training.log, metrics.csv, tensorboard, figures)", logs)
