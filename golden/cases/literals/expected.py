# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] torch.float64
#   [1] float inf
#   [2] float -inf
#   [3] float nan
#   [4] complex (-0+1j)
#   [5] torch.float16
#   [6] torch.strided
#   [7] int

import torch
import golden_case_literals


def execution_fn(x, *, __vllm_submods__):
    len_1 = len(
        [
            x,
            0,
            -1,
            1180591620717411303424,
            True,
            False,
            None,
            ...,
            0.0,
            -0.0,
            1e-300,
            -2.5,
            1j,
            (2 - 3j),
            "",
            "it's",
            'say "hi"',
            "tab\tnew\nline\\",
            "\xe9\u4e2d\ud800",
            b"\x00raw'",
            (),
            (1,),
            (1, (2, [3])),
            [],
            [x, {"k": x, 1: None}],
            {},
            slice(None, 3, -1),
        ]
    )
    new_tensor = x.new_tensor([1.0, -0.0], dtype=__vllm_consts__[0])
    collect = golden_case_literals.collect(
        0,
        -1,
        1180591620717411303424,
        True,
        False,
        None,
        ...,
        0.0,
        -0.0,
        1e-300,
        -2.5,
        1j,
        (2 - 3j),
        "",
        "it's",
        'say "hi"',
        "tab\tnew\nline\\",
        "\xe9\u4e2d\ud800",
        b"\x00raw'",
        (),
        (1,),
        (1, (2, [3])),
        [],
        [x, {"k": x, 1: None}],
        {},
        slice(None, 3, -1),
        beside=(
            __vllm_consts__[1],
            __vllm_consts__[2],
            __vllm_consts__[3],
            __vllm_consts__[4],
            __vllm_consts__[5],
            __vllm_consts__[6],
        ),
        more=__vllm_consts__[7],
    )
    return (len_1, new_tensor, collect)
