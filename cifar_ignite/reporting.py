"""What people look at while a run trains and after it. None of it can end the training: a failure warns once."""

import inspect
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import Metric
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from torch.optim import Optimizer

from cifar_ignite.checkpoints import Row, RunRecord, replacing

PLAIN_LINE_SECONDS = 60

logger = logging.getLogger(__name__)


class Tolerant:
    """Calls that may fail for want of space or rights: the first failure of a kind is told, training goes on."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                logger.warning("cannot write %s (%s); training goes on without it", what, error)


# --- Within an epoch ----------------------------------------------------------------------------------------------


def has_terminal() -> bool:
    """Whether a progress bar can be drawn on stderr."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def attach_progress(trainer: Engine, metrics: dict[str, Metric], optimizer: Optimizer, every: int) -> None:
    """Show loss, accuracy, learning rate and the time left of the epoch, looking every so many iterations.

    A bar on a terminal; elsewhere a plain line a minute. Of several processes, one shows its own part.
    """

    def now(_: Any = None) -> dict[str, str]:
        # Without Ignite's decorator, which would wait for the other processes.
        loss, accuracy = (inspect.unwrap(type(metric).compute)(metric) for metric in metrics.values())
        return {
            "loss": f"{loss:.3f}",
            "acc": f"{accuracy:.1%}",
            "lr": f"{optimizer.param_groups[0]['lr']:.2e}",
        }

    event = Events.ITERATION_COMPLETED(every=every)
    if has_terminal():
        ProgressBar(dynamic_ncols=True).attach(trainer, output_transform=now, event_name=event)
        return
    # When and at which iteration the epoch began here, and when the last line was printed.
    clock = {"start": 0.0, "from": 0, "line": 0.0}

    def start(engine: Engine) -> None:
        began = time.monotonic()
        clock.update({"start": began, "from": engine.state.iteration, "line": began})

    def line(engine: Engine) -> None:
        length, elapsed = engine.state.epoch_length or 1, time.monotonic() - clock["start"]
        done = (engine.state.iteration - 1) % length + 1
        if time.monotonic() - clock["line"] < PLAIN_LINE_SECONDS or done == length:
            return
        clock["line"] = time.monotonic()
        left = elapsed / (engine.state.iteration - clock["from"]) * (length - done)
        shown = "  ".join(f"{name} {value}" for name, value in now().items())
        logger.info("  iteration %d/%d  %s  %s left", done, length, shown, format_seconds(left))

    trainer.add_event_handler(Events.EPOCH_STARTED, start)
    trainer.add_event_handler(event, line)


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


# --- After each epoch ---------------------------------------------------------------------------------------------


def attach_reports(trainer: Engine, record: RunRecord, logs: Path, figures_every: int) -> None:
    """After each epoch: a line in the log, metrics.csv, TensorBoard events, and now and then the figures.

    All are made from the record's history, so they agree with the checkpoints: a resumed run goes on where its
    checkpoint was, whatever was written after it.

    Args:
        trainer: its epochs are told.
        record: has the newest row when an epoch completes, and the whole past when training starts.
        logs: folder of the run's logs.
        figures_every: epochs between drawings of the figures, which are also drawn at the end.
    """
    tolerant = Tolerant()
    board = _Board(logs / "tensorboard")
    clock = {"start": time.monotonic(), "epoch": 0}

    def draw() -> None:
        def import_and_draw() -> None:
            from cifar_ignite.figures import draw_history  # matplotlib takes long to import: not before it is needed

            draw_history(record.history, logs / "figures")

        tolerant("figures", import_and_draw)

    def start(engine: Engine) -> None:
        clock.update({"start": time.monotonic(), "epoch": record.epoch})

    def report(engine: Engine) -> None:
        logger.info(_epoch_line(record, engine.state.max_epochs or 0, clock["start"], int(clock["epoch"])))
        tolerant("metrics.csv", lambda: write_history(record.history, logs / "metrics.csv"))
        tolerant("TensorBoard events", lambda: board.write(record.history))
        if record.epoch % figures_every == 0:
            draw()

    trainer.add_event_handler(Events.STARTED, start)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, report)
    trainer.add_event_handler(Events.COMPLETED, draw)


def _epoch_line(record: RunRecord, epochs: int, started: float, first_epoch: int) -> str:
    row, epoch, val = record.history[-1], record.epoch, ""
    if row["val_acc"] is not None:
        best = " (best)" if row is record.best else ""
        val = f"  val loss {row['val_loss']:.3f} acc {row['val_acc']:.2%}{best}"
    left = format_seconds((time.monotonic() - started) / max(1, epoch - first_epoch) * (epochs - epoch))
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}  train loss {row['train_loss']:.3f} acc {row['train_acc']:.2%}{val}"
        f"  lr {row['lr']:.2e}  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s  {left} left"
    )


def write_history(history: list[Row], path: Path) -> None:
    """metrics.csv, whole at any moment."""
    with replacing(path) as temporary:
        pd.DataFrame(history).to_csv(temporary, index=False)


class _Board:
    """TensorBoard events of the history.

    tensorboardX's SummaryWriter hands events to a thread; when that dies of a full disk, training hangs as soon as its
    queue is full. Its EventsWriter writes at once, and raises here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._written = 0

    def write(self, history: list[Row]) -> None:
        """Append the rows that are not there yet; the first time, begin a new file with all of them."""
        if self._writer is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._writer = EventsWriter(str(self.folder / "events"))
        for row in history[self._written :]:
            for column, value in row.items():
                if column != "epoch" and value is not None:
                    tag = column.replace("_", "/", 1) if column.startswith(("train", "val")) else column
                    event = Event(step=row["epoch"], wall_time=time.time(), summary=scalar(tag, value))
                    self._writer.write_event(event)
            self._written += 1
        self._writer.flush()
