"""Configuration files: JSON with "extends", `section.key=value` overrides, one-line errors, generated documentation."""

import contextlib
import copy
import difflib
import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cifar_ignite.config import RESUME_SAFE_KEYS, Config, iterate_fields
from cifar_ignite.errors import InputError

SCHEMA_KEY = "$schema"
EXTENDS_KEY = "extends"
RENAMED_KEYS = {
    "data.source": "data.dataset",
    "data.validation": "data.val_size",
    "augment.crop_mode": "augment.padding_mode",
    "augment.perspective_distortion": "augment.distortion_scale",
    "augment.off_fraction": "augment.strong_off_fraction",
    "train.save_failures_allowed": "train.max_save_failures",
    "train.drop_path_ramp": "train.drop_path_decay_fraction",
}


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration and apply overrides.

    Args:
        source: Name of a shipped configuration, for example "se_fast", otherwise the path of a JSON file: an object
            with the sections of `Config`. Missing keys keep the value of what "extends" names (a shipped configuration,
            otherwise a path relative to the file), otherwise their default; "$schema" is for editors.
        overrides: Strings `section.key=value`; the value is parsed as JSON, otherwise taken as a string.

    Raises:
        InputError: If a file is missing or malformed, "extends" forms a cycle, a key is unknown or appears twice, or a
            value is out of range.
    """
    path = shipped_configs().get(str(source), Path(source))
    return parse_config(_read_extended(path, ()), str(source), overrides)


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configurations by name: files in the installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    directory = next(filter(os.path.isdir, (package / "configs", package.parent / "configs")), package)
    files = [directory / name for name in sorted(glob.glob("*.json", root_dir=directory))]
    return {path.stem: path for path in files if path.stem != "schema"}


def parse_config(tree: Any, source: str, overrides: Iterable[str] = ()) -> Config:
    """Validate a configuration tree.

    Args:
        tree: Nested dicts as JSON gives them.
        source: Name of the tree's origin; error messages begin with it.
        overrides: Strings `section.key=value`.

    Raises:
        InputError: If a key is unknown or a value is out of range; the message lists all problems.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected a JSON object of configuration sections, got {type(tree).__name__}")
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    try:
        # Through JSON, so that strict types are JSON's types: a list is a tuple, an int is a float, "1" is neither.
        return Config.model_validate_json(json.dumps(tree, ensure_ascii=False).encode(), strict=True)
    except UnicodeEncodeError as error:
        start = error.object[: error.end][-30:]
        raise InputError(f"{source}: not valid UTF-8 at the end of {start!r}; use UTF-8") from None
    except ValidationError as error:
        problems = "; ".join(_format_error(problem) for problem in error.errors())
        raise InputError(f"{source}: {problems}") from None


# --- Reading files ------------------------------------------------------------------------------------------------


def _read_extended(path: Path, children: tuple[Path, ...]) -> Any:
    """Return the tree of a file merged over the file that it extends; `children` are the files that led here."""
    tree = _read_json(path)
    if not isinstance(tree, dict):
        return tree
    tree.pop(SCHEMA_KEY, None)
    if EXTENDS_KEY not in tree:
        return tree
    parent = tree.pop(EXTENDS_KEY)
    if not isinstance(parent, str) or Path(parent).is_absolute():
        raise InputError(
            f"{path}: extends: expected the name of a shipped configuration, or a path relative to this file, got "
            f"{json.dumps(parent)}"
        )
    parent_path = shipped_configs().get(parent, path.parent / parent)
    if not os.path.isfile(parent_path):
        raise InputError(f"{path}: extends: {parent}: no such file; {_suggest_shipped(parent)}")
    chain = (*children, path.resolve())
    if parent_path.resolve() in chain:
        raise InputError(f"{path}: extends: {parent} extends this file, which is a cycle")
    base = _read_extended(parent_path, chain)
    if not isinstance(base, dict):
        raise InputError(f"{path}: extends: {parent}: expected a JSON object, got {type(base).__name__}")
    return merge_trees(base, tree)


def merge_trees(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with `changes` applied, recursively for nested dicts."""
    merged = dict(base)
    for key, value in changes.items():
        both_trees = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_trees(merged[key], value) if both_trees else value
    return merged


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        reason = getattr(error, "strerror", None) or error
        hint = f"; {_suggest_shipped(path)}" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{path}: cannot read the configuration: {reason}{hint}") from None
    try:
        return json.loads(text, object_pairs_hook=_reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    # A duplicate key; a number with more digits, or brackets nested deeper, than Python parses.
    except (InputError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InputError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return tree


# --- Overrides and errors -----------------------------------------------------------------------------------------


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key or not all(sections):
        raise InputError(f"--set {override}: expected section.key=value, for example optimizer.lr=0.1")
    section: Any = Config
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise InputError(f"--set {override}: {name} is not a section")
        section = _field_type(section, name)
    tree[key] = text
    # A directory named 2026 is still a string; everything else is JSON.
    if _field_type(section, key) not in (str, Path):
        with contextlib.suppress(ValueError, RecursionError):
            tree[key] = json.loads(text)


def _field_type(section: Any, key: str) -> Any:
    """Return the type of a field; None for an unknown key, which validation reports."""
    field = getattr(section, "model_fields", {}).get(key)
    return field and field.annotation


def _format_error(problem: Any) -> str:
    """Format one pydantic error as "data.batch_size: what is wrong, got ..."."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        if key in RENAMED_KEYS:
            return f"unknown key {key}: it is now {RENAMED_KEYS[key]}"
        section: Any = Config
        for name in location[:-1]:
            section = section.model_fields[name].annotation
        return f"unknown key {key}: {suggest_name(location[-1], section.model_fields)}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}".removeprefix(": ")  # a check of the top level has no key
    return f"{key}: {problem['msg']}, got {problem['input']!r}"


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return "did you mean X?" for the closest known name, or the list of known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def diff_from_defaults(tree: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys of a configuration tree whose value is not the default, with the default and the value."""
    defaults = flatten_dict(Config().model_dump(mode="json"))
    values = flatten_dict(tree)
    return {key: (defaults.get(key), value) for key, value in values.items() if value != defaults.get(key)}


def _suggest_shipped(path: str | Path) -> str:
    """Return the names of the shipped configurations, and which one may have been meant by a missing file."""
    names = ", ".join(shipped_configs())
    close = difflib.get_close_matches(Path(path).stem, shipped_configs(), n=1)
    return f"did you mean {close[0]}? Shipped: {names}" if close else f"shipped: {names}"


def flatten_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"data.root": 1} for {"data": {"root": 1}}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- Generated documentation --------------------------------------------------------------------------------------


def config_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file (configs/schema.json), used by editors to complete and check."""
    schema = Config.model_json_schema()
    schema["properties"] |= {
        SCHEMA_KEY: {"type": "string", "description": "location of this schema, for editors"},
        EXTENDS_KEY: {
            "type": "string",
            "description": "what this extends: a shipped configuration, or a path relative to this file",
        },
    }
    return {SCHEMA_KEY: "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "cifar_ignite"}


def format_config_schema() -> str:
    """Return the JSON schema as text."""
    return json.dumps(config_json_schema(), indent=2, ensure_ascii=False)


def format_config_reference() -> str:
    """Return docs/configuration.md: every key with its meaning, default, and whether a resumed run may change it."""
    defaults = flatten_dict(Config().model_dump(mode="json"))
    rows = [
        f"| `{key}` | {' '.join((field.description or '').split())} | `{json.dumps(defaults[key])}` "
        f"| {'yes' if key in RESUME_SAFE_KEYS else ''} |"
        for key, field in iterate_fields(Config)
    ]
    return "\n".join([*_REFERENCE_HEAD, *rows])


_REFERENCE_HEAD = """\
# Configuration

Generated from `cifar_ignite/config.py` by `make docs`; edit the docstrings there.

A run is one JSON file. `configs/` contains `se`, `stochastic` and `hybrid`, each also as `_fast` and `_best`, and
`demo`; their names stand for these files in any directory, installed or not. Every other `--config` is a path. A file
contains only what differs: from what `"extends"` names (one of these names, otherwise a path relative to the file), or
from the defaults below. `config.json` in a run directory is always fully resolved. Unknown keys are refused with the
closest known name.

`--set section.key=value`, or `SET="key=value key=value"` with make, overrides single keys; the value is JSON or a
string. Editors that support JSON schemas complete and check the files with `configs/schema.json`.

A key marked under "Resume" may differ when a run is resumed; a change of any other key requires `--allow-changes`.

| Key | Meaning | Default | Resume |
|---|---|---|---|""".splitlines()
