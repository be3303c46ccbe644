"""Rules for custom ops, held against a graph. In: a configuration and what was traced. Out: an error or a warning where the graph breaks a rule.

It switches nothing: a model asks ``config.is_custom_op_enabled`` and calls the op or its plain form.
"""

from __future__ import annotations

import torch

from piecework.codegen.split.splitting import operator_name
from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.splitting_op import registry

_TORCHS_OWN = ("aten", "prim", "prims")


def check_custom_ops(config: CompilationConfig, graph: torch.fx.GraphModule) -> None:
    """Hold ``graph`` to the rules of ``custom_ops``; a rule names ``ns::op``, or ``op`` of any namespace but torch's own.

    Raises:
        ConfigError: a rule switches an op off, and the graph calls it.
    """
    if not any(rule[0] in "+-" for rule in config.custom_ops):
        return
    called = {operator_name(node.target) for node in graph.graph.nodes}
    full = {name for name in called if name and name.partition("::")[0] not in _TORCHS_OWN}
    present = full | {name.partition("::")[2] for name in full}
    # What is switched off is rightly absent, and a bare name may be one of the model's layers, which is no operator.
    unseen = {rule[1:] for rule in config.custom_ops if rule[0] == "-" or "::" not in rule}
    config.custom_op_log_check(present | unseen, registry.names())
    broken = [rule for rule in config.custom_ops if rule[0] == "-" and rule[1:] in present]
    if broken:
        raise ConfigError(
            f"rule {broken[0]!r} switches a custom op off, and the model calls it",
            where="custom_ops",
            hint=f"let the model ask config.is_custom_op_enabled({broken[0][1:]!r}) before it calls the op, or leave out the rule",
        )
