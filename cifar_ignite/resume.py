"""Finding the training state to continue from, and making sure that it belongs to the run that is asked for."""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from ignite.metrics import Metric
from torch import nn

from cifar_ignite.checkpoints import load_checkpoint, newest
from cifar_ignite.config import Config, InputError, flatten, parse_config
from cifar_ignite.processes import restore_metric, same_for_all

# What may differ between a run and its continuation: it changes where and how things run, not what is trained.
FREE_TO_CHANGE = {
    "experiment",
    "output_dir",
    "device",
    "compile",
    "data.root",
    "train.checkpoint_every",
    "train.save_every_seconds",
    "train.save_failures_allowed",
    "train.log_every",
}

# With these, the optimizer holds its parameters in another order.
REORDERING = {"optimizer.name", "train.whiten_stem"}

logger = logging.getLogger(__name__)


@dataclass
class Resumed:
    """A run to be continued.

    Attributes:
        run_dir: its folder; None for a state outside of any run folder, which continues in a new one.
        path: the training state; None if the run was stopped before it saved one, and so begins again.
        saved: what is in it.
        config: under which it goes on.
        changed: keys of `config` that differ from the run's own, with the old and the new value.
        kept: keys in which the configuration that was asked for differs, but the run's own stands.
    """

    run_dir: Path | None
    path: Path | None
    saved: dict[str, Any]
    config: Config
    changed: dict[str, tuple[Any, Any]]
    kept: list[str]

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.saved["record"].epoch if self.saved else 0

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or early stopping ended the run and no more epochs are asked for."""
        patience, more = self.config.train.patience, "train.epochs" in self.changed
        stopped = patience and self.saved and self.saved.get("early_stopping", {"counter": 0})["counter"] >= patience
        return self.epoch >= self.config.train.epochs or bool(stopped and not more)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a state whose weights are those of another network."""
        if not self.saved:
            return
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in self.saved["model"].items()}
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise InputError(
                    f"{self.path}: not the configured network: {name} is {found.get(name, 'missing')} in the state "
                    f"and {shapes.get(name, 'missing')} in the network"
                )

    def check_length(self, epoch_length: int, allow_changes: bool) -> None:
        """Refuse a state whose epochs have another number of iterations: the data or the batch size is another.

        Where changes are allowed, the state goes back to the end of its last whole epoch.
        """
        if not self.saved or self.saved["trainer"]["epoch_length"] == epoch_length:
            return
        if not allow_changes:
            then = self.saved["trainer"]["epoch_length"]
            raise InputError(
                f"{self.path}: an epoch had {then} iterations and now has {epoch_length}: "
                "the data is not what the run was trained on"
            )
        self.saved["trainer"] |= {"epoch_length": epoch_length, "iteration": self.epoch * epoch_length}

    def check_processes_agree(self) -> None:
        """Refuse to go on if another process has found another state."""
        if str(self.path) != (first := same_for_all(str(self.path))):
            raise InputError(
                f"{self.path}: the first process resumes {first}; all machines must see the same output_dir"
            )

    def load_into(self, state: dict[str, Any]) -> None:
        """Give each object of a run its saved state.

        Hyperparameters are those of the configuration: of the optimizer, only its momenta are taken over, and not even
        they if they would belong to other parameters: they are saved in the optimizer's order.

        Raises:
            InputError: the state does not fit the objects.
        """
        if not self.saved:
            return
        saved = {"ema": self.saved["model"], **self.saved, "record": self.saved["record"].state_dict()}
        saved["trainer"] = saved["trainer"] | {"max_epochs": self.config.train.epochs}
        groups = state["optimizer"].state_dict()["param_groups"]
        at_zero = state["optimizer"].state_dict()["state"]
        momenta = at_zero | saved["optimizer"]["state"]  # without momentum so far, there are none in it
        if reordered := sorted(REORDERING & self.changed.keys()):
            momenta = at_zero
            logger.info("momenta begin at zero, because of another %s", " and ".join(reordered))
        saved["optimizer"] = {"state": momenta, "param_groups": groups}
        try:
            Checkpoint.load_objects({key: thing for key, thing in state.items() if key in saved}, saved)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path}: does not fit the configured run: {reason}") from None
        # A state that was copied elsewhere has left its best model behind: the next epoch's is then the best so far.
        best = state.get("best")
        if best and best.last_checkpoint and not (best.save_handler.folder / best.last_checkpoint).exists():
            best.reset()

    def finish_epoch(self, trainer: Engine, metrics: dict[str, Metric]) -> None:
        """Go on within the epoch in which the run was stopped.

        The metrics gathered so far are put back once Ignite has reset them for the epoch. If the run was stopped
        after the last iteration but before the end of the epoch, all that is due at that end is done first.
        """
        epoch_length = trainer.state.epoch_length or 1
        if not self.saved or trainer.state.iteration == self.epoch * epoch_length:
            return

        def restore() -> None:
            for name, metric in metrics.items():
                restore_metric(metric, self.saved["metrics"][name])

        if trainer.state.iteration % epoch_length:
            trainer.add_event_handler(Events.EPOCH_STARTED(once=self.epoch + 1), restore)
        else:
            restore()
            trainer.fire_event(Events.EPOCH_COMPLETED)

    def describe(self) -> str:
        """What is continued, and how it differs."""
        if not self.saved:
            return f"{self.run_dir} has no checkpoint yet: it begins again"
        line = f"resuming after epoch {self.epoch}, iteration {self.saved['trainer']['iteration']}, from {self.path}"
        for key, (old, new) in self.changed.items():
            line += f"\n  {_describe(key, old, new)}"
        if "train.epochs" in self.changed:
            epochs = self.config.train.epochs
            line += f": from here on the learning rate is that of a run planned for {epochs} epochs"
        if self.kept:
            line += f"\n  the run keeps its own {', '.join(self.kept)} (the configuration file says otherwise)"
        return line


def find_resumed(config: Config, resume: str, overrides: Sequence[str], allow_changes: bool) -> Resumed:
    """The run that `--resume` means, and the configuration under which it goes on: its own, and what is overridden.

    Args:
        config: what is asked for: says where to look, and, if changes are allowed, how to go on.
        resume: "latest" for the newest run of the experiment, whose newest whole state is taken; a run folder, whose
            newest state is taken; or a training state. Only "latest" falls back from a damaged state to an older one.
        overrides: `section.key=value` that are to differ from the run's own configuration.
        allow_changes: go on under `config` as it is; otherwise only more epochs, and what does not change what is
            trained, may differ.

    Raises:
        InputError: there is none, it is no training state, or it belongs to another configuration.
    """
    path = Path(resume).absolute()
    run_dir: Path | None
    found: Path | None
    if resume == "latest":
        run_dir = newest_run(config.output_dir / "training_runs", config.experiment)
        found, saved = _newest_whole(_states(run_dir))
    elif path.is_dir():
        run_dir = path
        found = next(iter(_states(path)), None)
        saved = _load_state(found) if found else {}
    else:
        found, saved = path, _load_state(path)
        inside = path.parent.name == "checkpoints" and (path.parent.parent / "config.json").exists()
        run_dir = path.parent.parent if inside else None
    source = str(found or run_dir)
    # Through Config: a key that the run's version did not know yet stood at what is now its default.
    then = parse_config(saved["record"].config if saved else _read_config(run_dir), source).model_dump(mode="json")
    own = parse_config(copy.deepcopy(then), source, overrides)
    # The folder may have been moved since.
    at_home = run_dir is not None and run_dir.parent.name == "training_runs"
    output_dir = run_dir.parent.parent if run_dir is not None and at_home else config.output_dir
    now = (config if allow_changes else own).model_copy(update={"output_dir": output_dir})
    changed = differences(then, now)
    longer = "train.epochs" in changed and now.train.epochs > (changed["train.epochs"][0] or 0)
    if (refused := changed.keys() - ({"train.epochs"} if longer else set())) and not allow_changes:
        told = ", ".join(_describe(key, *changed[key]) for key in sorted(refused))
        raise InputError(
            f"{source}: cannot be resumed under another configuration: {told} (--allow-changes takes it all the same)"
        )
    kept = sorted(differences(then, config).keys() - changed.keys())
    return Resumed(run_dir, found, saved, now, changed, kept)


def _describe(key: str, old: Any, new: Any) -> str:
    return f"{key} was {json.dumps(old)}, now {json.dumps(new)}"


def _read_config(run_dir: Path | None) -> dict[str, Any]:
    try:
        return dict(json.loads(((run_dir or Path()) / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{run_dir}: not a run folder: no training state and no configuration in it") from None


def differences(then: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that change what is trained, with the value of a saved configuration and of this one."""
    old, new = flatten(then), flatten(config.model_dump(mode="json"))
    return {key: (old.get(key), new[key]) for key in new if key not in FREE_TO_CHANGE and old.get(key) != new[key]}


def newest_run(runs: Path, experiment: str) -> Path:
    """The run folder of an experiment in which something was written last.

    Raises:
        InputError: there is none.
    """
    files = [
        file
        for run_config in runs.glob("*/config.json")
        if _experiment(run_config.parent) == experiment
        for file in [run_config, *_states(run_config.parent)]
    ]
    found = newest(files)
    if found is None:
        raise InputError(f"{runs}: no run of experiment {experiment!r} to resume; start one without RESUME")
    return found.parent if found.name == "config.json" else found.parent.parent


def _experiment(run_dir: Path) -> Any:
    try:
        return _read_config(run_dir).get("experiment")
    except InputError:
        return None


def _states(run_dir: Path) -> list[Path]:
    """Training states of a run, the newest first."""
    files = [*(run_dir / "checkpoints").glob("latest_*.pt"), *(run_dir / "checkpoints").glob("epoch_*.pt")]
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _newest_whole(states: list[Path]) -> tuple[Path | None, dict[str, Any]]:
    """The first state that loads, telling of those that do not."""
    for path in states:
        try:
            saved = _load_state(path)
        except InputError as error:
            logger.warning("%s; falling back to an older state", error)
            continue
        return path, saved
    if states:
        raise InputError(f"{states[0].parent}: none of the {len(states)} training states is whole")
    return None, {}


def _load_state(path: Path) -> dict[str, Any]:
    saved = load_checkpoint(path)
    if missing := {"optimizer", "trainer", "timer", "metrics"} - saved.keys():
        raise InputError(
            f"{path}: not a training state (no {', '.join(sorted(missing))} in it); "
            "resume from a latest_*.pt or an epoch_*.pt"
        )
    try:
        counters = [saved["trainer"]["iteration"], saved["trainer"]["epoch_length"], *saved["optimizer"]["state"]]
        counters += [saved["early_stopping"]["counter"]] if "early_stopping" in saved else []
        whole = all(isinstance(counter, int) for counter in counters) and counters[1] > 0
        float(saved["timer"]["seconds"])
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path}: not a training state of this version of cifar_ignite")
    return saved
