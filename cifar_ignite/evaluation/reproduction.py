"""The commands that reproduce an evaluation, for its report."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.evaluation.trained_model import TrainedModel
from cifar_ignite.training.environment import join_words


def reproducing_commands(trained: TrainedModel, tta: str | None, test_file: Path | None) -> list[str]:
    """Return the commands that train a model from its config.json, and evaluate it as it was evaluated.

    They run where the original ones did, because paths may be relative, and write to a directory of their own, whose
    best model is then that of the reproduced run. A checkpoint that is kept, `epoch_*.pt`, is that of the same name.
    The latest ones, `latest_*.pt`, cannot be reproduced, which a comment says. Any other one is the best model of a
    complete run.

    Args:
        trained: Evaluated model.
        tta: Test-time augmentation of the evaluation; None without.
        test_file: Unlabeled test pickle; None if the images are the test set of the dataset.
    """
    name, output_dir = trained.path.resolve().name, f"reproduced_{trained.record.run}"
    train = f"python -m cifar_ignite train --config config.json --set output_dir={output_dir}"
    if name.startswith("latest_") and name.endswith(".pt"):
        return [train, f"# no command evaluates {name}: a run deletes its latest checkpoints"]
    if name.endswith(".pt"):  # the shell finds the run
        model = f"--checkpoint {output_dir}/training_runs/*/checkpoints/{shlex.quote(name)}"
    else:
        model = join_words("--model", parse_config(trained.record.config, trained.record.run).experiment)
    words = ["--set", f"output_dir={output_dir}", *_overrides(trained)]
    words += ["--test-file", str(test_file)] if test_file else []
    words += ["--tta", tta] if tta else []
    return [train, f"python -m cifar_ignite evaluate {model} {join_words(*words)}"]


def _overrides(trained: TrainedModel) -> Iterator[str]:
    """Yield the words that override what the evaluation has changed in the configuration of the run."""
    saved, used = (
        flatten_dict(config.model_dump(mode="json"))
        for config in (parse_config(trained.record.config, trained.record.run), trained.config)
    )
    for key, value in used.items():
        if value != saved[key] and key != "output_dir":
            yield from ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
