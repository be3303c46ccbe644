# piecework stitching source, format 1

import torch
import golden_case_slices


def execution_fn(x, n, *, __vllm_submods__):
    getitem = x[:n]
    getitem_1 = x[n:]
    getitem_2 = x[::n]
    getitem_3 = x[-1:]
    getitem_4 = x[1:n, 0]
    getitem_5 = x[..., None, n::2]
    getitem_6 = x[:, [0, n]]
    getitem_7 = x[(n,)]
    getitem_8 = x[()]
    keep = golden_case_slices.keep({"a": [slice(n, (n, 1), None)], "b": (slice(None, n, None),)})
    return (
        getitem,
        getitem_1,
        getitem_2,
        getitem_3,
        getitem_4,
        getitem_5,
        getitem_6,
        getitem_7,
        getitem_8,
        keep,
    )
