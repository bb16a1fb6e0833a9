"""Errors that end a command with one line on stderr, and the translation of library errors into them."""

import contextlib
import re
from collections.abc import Iterator


class InputError(Exception):
    """Invalid input: the message is one line that names the thing, what is wrong and the fix.

    Attributes:
        status: Exit status of the command.
        should_report: Whether this rank prints the error; None if the ranks have not agreed on one.
    """

    status = 2
    should_report: bool | None = None


class TrainingError(Exception):
    """A run that cannot continue although its input was valid, for example because training diverged.

    Attributes:
        status: Exit status of the command.
        should_report: Whether this rank prints the error; None if the ranks have not agreed on one.
        peer_lost: Whether another rank is gone, so that pending collectives may never finish.
    """

    status = 1
    should_report: bool | None = None
    peer_lost = False


class NonFiniteError(TrainingError):
    """The gradient or the validation loss became infinite or NaN."""


class TrainingInterrupted(TrainingError):
    """A signal stopped the run after its state was saved.

    Attributes:
        status: Exit status of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)  # all arguments, with which it is unpickled in another process
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def translate_oom_errors() -> Iterator[None]:
    """Translate out-of-memory errors of the host, a CUDA GPU or MPS into a `TrainingError`.

    Raises:
        TrainingError: If memory was exhausted inside the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        # The words of torch, of its CPU allocator, of CUDA and MPS, and of cuDNN and cuBLAS.
        words = "OutOfMemory", "CPUAllocator", "out of memory", "Invalid buffer size", "ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not any(word in reason for word in words):
            raise
        raise TrainingError(
            f"out of memory ({reason}); use a smaller data.batch_size, model.width or data.image_size, or free memory "
            "used elsewhere"
        ) from None


@contextlib.contextmanager
def translate_missing_operators() -> Iterator[None]:
    """Translate the error of an operator that torch does not have on MPS, an Apple GPU.

    Raises:
        TrainingError: If such an operator was called inside the block.
    """
    try:
        yield
    except NotImplementedError as error:
        found = re.search(r"The operator '(.+?)' is not currently .*for the MPS device", first_line(error))
        if not found:
            raise
        raise TrainingError(
            f"{found[1]}: torch has no such operator on an Apple GPU (MPS); set PYTORCH_ENABLE_MPS_FALLBACK=1 in the "
            "environment to run it on the CPU, or use device=cpu"
        ) from None


def check_named(**names: object) -> None:
    """Check that no name that a user may leave out is empty, as an unset variable of a shell is.

    Args:
        names: Paths or names by what they name.

    Raises:
        InputError: If one is an empty string.
    """
    for what, name in names.items():
        if name == "":
            raise InputError(f"{what}: an empty name; is a variable unset? Name something, or leave {what} out")


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
