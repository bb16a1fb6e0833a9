"""Types and markers of configuration fields."""

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from cifar_ignite.files import check_portable_name, check_windows_path


class Resume(Enum):
    """What a changed key means for a resumed run; a key without this marker changes what is trained."""

    SAFE = "changes where and how training runs, not what is trained"
    OPTIMIZER_LAYOUT = "changes the order of the parameters in the optimizer's state"
    RESOLVED = "null leaves the value to the data; a run records the value"


def _expand_user(path: Path) -> Path:
    """Expand `~` and `~user`, and refuse what the file system does not accept."""
    if "\0" in str(path):
        raise ValueError("a path cannot contain a null character")
    if os.name == "nt":
        check_windows_path(PureWindowsPath(path))
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"the home directory of {path.parts[0]} is not known; use an absolute path") from None


@dataclass(frozen=True)
class StrongOff:
    """Marks an augmentation as strong: `value` switches it off for the last epochs (augment.strong_off_fraction)."""

    value: Any


Probability = Annotated[float, Field(ge=0, le=1)]
StrongProbability = Annotated[float, Field(ge=0, le=1), StrongOff(0.0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, AfterValidator(check_portable_name)]
# With forward slashes in JSON, which Windows accepts too, so that a run can be moved.
Directory = Annotated[Path, AfterValidator(_expand_user), PlainSerializer(Path.as_posix, when_used="json")]
PixelValue = Annotated[float, Field(ge=0, le=1)]
PositivePixelValue = Annotated[float, Field(gt=0, le=1)]
Channels = tuple[PixelValue, PixelValue, PixelValue]
PositiveChannels = tuple[PositivePixelValue, PositivePixelValue, PositivePixelValue]


class Section(BaseModel):
    """A group of keys: immutable, without unknown keys, NaN or infinity; docstrings of fields describe the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
