"""The commands that reproduce an evaluation, for its report."""

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.evaluation.trained_model import TrainedModel

# An output directory without runs: the best model in it is that of the reproduced run.
OUTPUT_DIR = "reproduced"


def reproducing_commands(trained: TrainedModel, tta: str | None, test_file: Path | None) -> list[str]:
    """Return the commands that train a model from its config.json, and evaluate it as it was evaluated.

    They run where the original ones did: paths may be relative. A full checkpoint, `*.pt`, is that of the same name in
    the reproduced run; any other checkpoint is its best model.

    Args:
        trained: Evaluated model.
        tta: Test-time augmentation of the evaluation; None without.
        test_file: Unlabeled test pickle; None if the images are the test set of the dataset.
    """
    name = trained.path.resolve().name
    if name.endswith(".pt"):  # the shell finds the run
        model = f"--checkpoint {OUTPUT_DIR}/training_runs/*/checkpoints/{shlex.quote(name)}"
    else:
        model = _join("--model", parse_config(trained.record.config, trained.record.run).experiment)
    words = ["--set", f"output_dir={OUTPUT_DIR}", *_overrides(trained)]
    words += ["--test-file", str(test_file)] if test_file else []
    words += ["--tta", tta] if tta else []
    return [
        f"python -m cifar_ignite train --config config.json --set output_dir={OUTPUT_DIR}",
        f"python -m cifar_ignite evaluate {model} {_join(*words)}",
    ]


def _overrides(trained: TrainedModel) -> Iterator[str]:
    """Yield the words that override what the evaluation has changed in the configuration of the run."""
    saved, used = (
        flatten_dict(config.model_dump(mode="json"))
        for config in (parse_config(trained.record.config, trained.record.run), trained.config)
    )
    for key, value in used.items():
        if value != saved[key] and key != "output_dir":
            yield from ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def _join(*words: str) -> str:
    """Return words as a shell reads them; the home directory, where it is written out, is "~", as in every command."""
    home = os.path.expanduser("~")
    return shlex.join(word.replace(f"{home}{os.sep}", f"~{os.sep}") for word in words)
