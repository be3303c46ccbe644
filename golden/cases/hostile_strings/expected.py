# piecework stitching source, format 1
#
# __vllm_consts__:
#   [0] tensor f32[2] from weight\nraise SystemExit #

import torch
import golden_case_hostile_strings


def execution_fn(x, *, __vllm_submods__):
    # layers.0?nraise SystemExit  mo?del?r.py:41
    same = golden_case_hostile_strings.same(
        "'); raise SystemExit('",
        '"""\nraise SystemExit\n"""',
        "{{ consts }} {% raw %} {# gone #}",
        "\\",
        "# type: ignore",
        "\r\nraise SystemExit",
        "\u2028import os\u2029",
        "\u0441opy \u202e gnirts",
        "\x00\x1b[31m",
        **{
            "'); raise SystemExit('": "'); raise SystemExit('",
            '"""\nraise SystemExit\n"""': '"""\nraise SystemExit\n"""',
            "{{ consts }} {% raw %} {# gone #}": "{{ consts }} {% raw %} {# gone #}",
            "\\": "\\",
            "# type: ignore": "# type: ignore",
            "\r\nraise SystemExit": "\r\nraise SystemExit",
            "\u2028import os\u2029": "\u2028import os\u2029",
            "\u0441opy \u202e gnirts": "\u0441opy \u202e gnirts",
            "\x00\x1b[31m": "\x00\x1b[31m",
        },
    )
    add = torch.add(x, __vllm_consts__[0])
    return (add, same)
