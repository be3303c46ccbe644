"""vLLM's own tests with piecework in the place of its compiler. In: its source distribution. Out: what pytest says.

cd vllm-0.32.0 && PYTHONPATH=…/tests/vllm python -m pytest -p own_tests tests/compile/test_codegen.py

A test of a GPU runs on the CPU, with `stand_in_graphs`; one that asks for processes of its own gets none.
"""

from __future__ import annotations

import os
import sys
import types

import torch


def pytest_configure() -> None:
    from engine_run import ENVIRONMENT, stand_in_graphs

    os.environ.update({"VLLM_PIECEWORK": "1", **ENVIRONMENT})
    utils = types.ModuleType("tests.utils")
    utils.create_new_process_for_each_test = lambda *_: lambda f: f  # type: ignore[attr-defined]
    sys.modules["tests.utils"] = utils
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    stand_in_graphs()
    in_place_of_vllms()


def in_place_of_vllms() -> None:
    """Its functions that piecework has by the same name."""
    from vllm.compilation import backends, codegen

    from piecework import codegen as ours
    from piecework.integrations.vllm import plugin

    backends.split_graph = ours.split_graph
    codegen.generate_execution_code = ours.generate_execution_code
    codegen.compile_execution_fn = ours.compile_execution_fn
    plugin.register()
