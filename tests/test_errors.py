"""Exit statuses, and the translation of out-of-memory errors."""

import pytest
import torch

from cifar_ignite.errors import (
    InputError,
    NonFiniteError,
    TrainingError,
    TrainingInterrupted,
    first_line,
    translate_oom_errors,
)


def test_errors_have_their_exit_status():
    assert InputError("x").status == 2
    assert TrainingError("x").status == NonFiniteError("x").status == 1
    assert TrainingInterrupted("x", 143).status == 143


def test_errors_are_reported_by_all_ranks_until_ranks_agree():
    for error in (InputError("x"), TrainingError("x"), TrainingInterrupted("x", 130)):
        assert error.should_report is None
    assert not TrainingError("x").peer_lost


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_translate_oom_errors_names_cause_and_fix_in_one_line(error):
    with pytest.raises(TrainingError, match="^out of memory") as raised, translate_oom_errors():
        raise error
    assert str(error).split("\n")[0] in str(raised.value)
    assert "data.batch_size" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), RuntimeError(), ValueError("out of memory")])
def test_translate_oom_errors_lets_other_errors_through(error):
    with pytest.raises(type(error)) as raised, translate_oom_errors():
        raise error
    assert raised.value is error


def test_first_line_skips_empty_lines():
    assert first_line(ValueError("\n  first \nsecond")) == "first"


def test_first_line_of_empty_message_is_type():
    assert first_line(ValueError()) == "ValueError"
