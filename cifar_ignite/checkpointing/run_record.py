"""What a checkpoint records about its run besides the weights."""

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Any, Literal

from pydantic import ConfigDict, JsonValue
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

# Format 1 had other names of configuration keys (config_io.RENAMED_KEYS).
FORMAT: Literal[2] = 2


class EpochMetrics(TypedDict):
    """One epoch: one row of metrics.csv. Losses are cross-entropies, accuracies are in [0, 1]."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float | None
    val_acc: float | None
    lr: float
    seconds: float
    images_per_second: float


@dataclass(config=ConfigDict(extra="forbid"))
class RunRecord:
    """Name, configuration, history and environments of a run.

    Attributes:
        run: Name of the run directory.
        config: Resolved configuration as JSON.
        class_names: Names of the classes, in label order.
        history: One entry per completed epoch.
        environments: One entry per environment that the run was trained in, with `from_iteration`, the completed
            iterations when it began there (see `training.environment`); empty in checkpoints that have none yet.
        train_fingerprint: Hash of the training images (`ImageDataset.fingerprint`); None if it was not recorded.
        val_fingerprint: Hash of the validation images (`ImageDataset.fingerprint`); None if it was not recorded.
        format: Version of the checkpoint's layout.
    """

    run: str
    config: dict[str, JsonValue]
    class_names: list[str]
    history: list[EpochMetrics] = field(default_factory=list)
    environments: list[dict[str, JsonValue]] = field(default_factory=list)
    train_fingerprint: str | None = None
    val_fingerprint: str | None = None
    format: Literal[2] = FORMAT

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def val_acc(self) -> float | None:
        """Validation accuracy of the last completed epoch, in [0, 1]; None without validation."""
        return self.history[-1]["val_acc"] if self.history else None

    @property
    def best(self) -> EpochMetrics | None:
        """Epoch with the highest validation accuracy, the first among equals; None without validation."""
        validated = [metrics for metrics in self.history if metrics["val_acc"] is not None]
        return max(validated, key=lambda metrics: metrics["val_acc"] or 0.0, default=None)

    def add_environment(self, environment: Mapping[str, JsonValue], iteration: int) -> None:
        """Record that training starts, or continues after `iteration` iterations, in an environment.

        An environment that equals the last one is not repeated.
        """
        entry = {"from_iteration": iteration, **environment}
        if not self.environments or self.environments[-1] | {"from_iteration": iteration} != entry:
            self.environments.append(entry)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load history and environments; name and configuration stay those of the current run."""
        self.history, self.environments = list(state["history"]), list(state["environments"])
