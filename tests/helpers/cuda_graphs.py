"""A CUDA graph without a GPU."""

WARMUP_CALLS = 3


def graph_in_static_memory(function, inputs):
    """Stand in for torch.cuda.make_graphed_callables: inputs and result of all calls are in the same memory."""
    for _ in range(WARMUP_CALLS):
        function(*inputs)
    result = function(*inputs)

    def replay(*tensors):
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor)
        return result.copy_(function(*inputs))

    return replay
