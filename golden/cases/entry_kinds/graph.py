"""Texts only: an entry with every kind of input, symbol, guard and result that a plan can have, on more than one device."""

import torch

from piecework.codegen.entry.emit import generate_entry
from piecework.codegen.entry.plan import (
    EntryPlan,
    FixedValue,
    FromConst,
    FromItems,
    FromLeaf,
    FromOutput,
    FromSymbol,
    Items,
    Leaf,
    Parameter,
    Symbol,
    TensorInput,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda", 1)

PLAN = EntryPlan(
    banner=("model: Demo",),
    parameters=(
        Parameter("ids", "", Leaf(0, "ids", TensorInput(torch.int64, CPU, ("s0",)))),
        Parameter(
            "cache",
            "",
            Items(
                tuple,
                "cache",
                (0, 1),
                (
                    Leaf(
                        1,
                        "cache[0]",
                        TensorInput(torch.float16, GPU, ("s1", 2, "s0"), (2, "2*s1", 1)),
                    ),
                    Leaf(2, "cache[1]", FixedValue("mean")),
                ),
            ),
        ),
        Parameter("state", "", Leaf(4, "state", TensorInput(torch.float16, GPU, ("s1", 2)))),
        Parameter("dtype", "", Leaf(5, "dtype", FixedValue(torch.float16))),
        Parameter("flag", "k", Leaf(3, "flag", FixedValue(True)), FixedValue(True)),
    ),
    symbols=(Symbol("s0", 2), Symbol("s1", 0, 64)),
    guards=("s0 % 2 == 0",),
    passed=(FromSymbol("s1"), FromLeaf(0), FromLeaf(1), FromLeaf(1, ".size(2)")),
    outputs=("logits",),
    result=FromItems(dict, ("logits", "n"), (FromOutput(0), FromConst(3))),
    batch=FromSymbol("s0"),
    apart=((4, (0, 1)),),
    binds=True,
)


def texts() -> dict[str, object]:
    return {"entry": generate_entry(PLAN)}
