"""The CPU's vector instructions. In: nothing. Out: whether Inductor knows them yet, and the search for them."""

from __future__ import annotations

import contextlib
import os

import torch


def vector_isa_unknown() -> bool:
    """Whether Inductor has yet to find out which vector instructions it may use, and nothing but a test will tell it."""
    from torch._inductor import config, cpu_vec_isa

    told = config.cpp.vec_isa_ok is not None or config.cpp.simdlen is not None
    told = told or os.getenv("ATEN_CPU_CAPABILITY") is not None
    found = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    return not told and hasattr(found, "cache_info") and not found.cache_info().currsize


def find_vector_isa() -> None:
    """Do what Inductor does to find its vector instructions, without testing those that tested ones include.

    `valid_vec_isa_list` tests every set that the CPU names, and Inductor uses the first that passes. If the first one passes,
    the others are listed as they are.
    """
    from torch._inductor import config, cpu_vec_isa

    known = getattr(cpu_vec_isa, "x86_isa_checker", list)()
    named = [
        isa
        for isa in cpu_vec_isa.supported_vec_isa_list
        if all(flag in known for flag in str(isa).split())
    ]
    included = bool(named) and bool(named[0])
    with config.patch({"cpp.vec_isa_ok": True}) if included else contextlib.nullcontext():
        cpu_vec_isa.valid_vec_isa_list()


def vector_bits() -> int | None:
    """How wide the vectors are that Inductor would write for here, 0 for none; None where it is not known without a test."""
    from torch._inductor import config

    if config.cpp.simdlen is not None:
        return config.cpp.simdlen if config.cpp.simdlen > 1 else 0
    # What torch's own kernels were chosen for; Inductor asks the same CPU.
    return {"AVX512": 512, "AVX2": 256, "DEFAULT": 0}.get(torch.backends.cpu.get_cpu_capability())
