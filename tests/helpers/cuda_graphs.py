"""A CUDA graph without a GPU."""

import torch

WARMUP_CALLS = 1


def record_in_static_memory(function, *inputs):
    """Stand in for `record_cuda_graph`: inputs and result of all calls are in the same memory."""
    memory = [tensor.clone() for tensor in inputs]
    state = torch.get_rng_state()
    for _ in range(WARMUP_CALLS):
        function(*memory)
    result = function(*memory)
    torch.set_rng_state(state)

    def replay(*tensors):
        for static, tensor in zip(memory, tensors, strict=True):
            static.copy_(tensor)
        return result.copy_(function(*memory)).clone()

    return replay
