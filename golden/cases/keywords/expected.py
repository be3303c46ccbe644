# piecework stitching source, format 1

import torch
import golden_case_keywords


def execution_fn(x, *, __vllm_submods__):
    received = golden_case_keywords.received(a=1, b=x)
    received_1 = golden_case_keywords.received(
        x, a=1, **{"from": x, "b": 2, "a-b": [x], "": 3, "\xe9": 4, "print": 5}
    )
    received_2 = golden_case_keywords.received(**{"__debug__": 1, "None": 2, "self": 3})
    uniform_ = x.uniform_(**{"from": 0.0, "to": 0.0})
    return (received, received_1, received_2, uniform_)
