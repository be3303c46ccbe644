"""Why a model can't be captured: a typed error with the user's own words and line, of what was raised while Dynamo traced.

It tells apart errors of piecework's own, of the model's code, and of Dynamo. Beside them, what is said of a model that asks for training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache

import torch
from torch.utils import _pytree as pytree

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError, PieceworkError, tell
from piecework.runtime import torch_compat

#: Why no trace goes through a stitched module.
OPAQUE = "it calls a stitched module, which is compiled already; leave that call out, put its .model there, or allow graph breaks"
_REMEDY = (
    "move the Python construct out of forward or behind a piecework.splitting_op; docs/graph-breaks.md has what usually replaces one, "
    "and with PIECEWORK_FULL_TRACEBACK=1 Dynamo's whole explanation is shown"
)
_OWN_FAULT = (
    "call the model itself with the example arguments: it has to run with them, on one device"
)
# How Dynamo tells of an exception of the code that it traces.
_RAISED = re.compile(
    r"(?:debug context: raised exception|\): got) (\w+)\((.*)\)$|debug context: (TypeError) <.+?>: (.+)$",
    re.MULTILINE,
)
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(each)) + os.sep for each in (torch.__file__, os.__file__)
)


def own_error(error: BaseException) -> PieceworkError | None:
    """The typed error that Dynamo may have wrapped."""
    return next((e for e in torch_compat.causes(error) if isinstance(e, PieceworkError)), None)


def capture_error(error: BaseException) -> CaptureError:
    """What Dynamo's ``error`` means for somebody who wants a model captured."""
    text = str(error).strip()
    line, code = _user_line(text)
    fakeless = re.search(
        r"no fake impl registered for <CustomOpDef\((.+?)\)>|no fake impl.*? for (\S+::\S+)", text
    )
    if fakeless is not None:
        name = fakeless[1] or fakeless[2]
        return CaptureError(
            f"the operator {name} has no fake implementation, which a trace needs to know its result's shape",
            where=line,
            hint=f'register one with @torch.library.register_fake("{name}")',
        )
    raised = _raised_by_model(text, code)
    if raised is not None:
        return CaptureError(f"the model's own forward raises {raised}", where=line, hint=_OWN_FAULT)
    reason = text.splitlines()[0] if text else type(error).__name__
    if not torch_compat.dynamo_failure(error):
        reason = f"{type(error).__name__}: {reason}"
    explained = re.search(
        r"^  Explanation: (.+)$|\(reason: (.+)\)$|^\s*- (.+?\.)(?:\s|$)", text, re.M
    )
    if explained is not None:
        reason += f". {next(filter(None, explained.groups())).rstrip('.')}"
    hints = re.findall(r"^  Hint: (.+)$", text, re.M)
    useful = [
        each for each in hints if not each.startswith(("This graph break", "It may be possible"))
    ]
    return CaptureError(
        f"the model can't be captured as one graph: {reason}",
        where=line,
        hint="; ".join([*(each.rstrip(".") for each in useful[:1]), _REMEDY]),
    )


def _raised_by_model(text: str, code: str) -> str | None:
    """The exception that the model's code raised, as ``ValueError: text``; None if it raised none."""
    if text.startswith("Data-dependent assertion failed"):
        return f"AssertionError at {code}"
    found = _RAISED.search(text)
    if found is None:
        return None
    kind, words = found[1] or found[3], (found[2] or found[4] or "").rstrip(",")
    words = re.sub(r"^\[ConstantVariable\(\w+: (.*)\)\]$", r"\1", words)  # as torch 2.11 has it
    quote = words[:1]
    if len(words) > 1 and quote == words[-1] and quote in "'\"":
        words = words[1:-1].replace(f"\\{quote}", quote).replace("\\n", " ")
    return f"{kind}: {words}".removesuffix(": ")


def _user_line(text: str) -> tuple[str | None, str]:
    """``model.py:41 in forward`` of the innermost of the user's lines in a traceback, and that line's code.

    Lines of torch's own modules, and of Python's, count only if there are no others.
    """
    lines = text.splitlines()
    frames = [
        (number, found)
        for number, line in enumerate(lines)
        if (found := re.match(r'\s*File "(.+)", line (\d+)(?:, in (.+))?$', line))
        and not found[1].startswith(_OURS)
    ]
    own = [each for each in frames if _is_users(each[1][1])]
    if not frames:
        return None, ""
    number, found = (own or frames)[-1]
    code = lines[number + 1].strip() if number + 1 < len(lines) else ""
    inside = f" in {found[3]}" if found[3] else ""
    return f"{os.path.basename(found[1])}:{found[2]}{inside}", code


def _is_users(path: str) -> bool:
    """Whether a file is neither torch's nor Python's own; models of installed packages are the user's."""
    torchs, pythons = map(path.startswith, _LIBRARIES)
    return not torchs and ("-packages" in path or not pythons)


# --- what a caller may have meant otherwise ------------------------------------------------------------


def tell_of_training(model: object, strict: bool) -> None:
    """Say that a model is in training mode, if a module of it goes by that: a warning, or an error where ``strict``."""
    if not isinstance(model, torch.nn.Module):
        return
    names = [
        f"{name or type(model).__name__} ({type(each).__name__})"
        for name, each in model.named_modules()
        if each.training and _asks_for_training(type(each))
    ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problem = CaptureError(
            f"the model is in training mode, and its module {names[0]}{more} goes by that: what is compiled stays so, with random dropout and norms of each batch",
            hint="call model.eval() before compiling",
        )
        tell(problem, strict=strict)


@cache
def _asks_for_training(kind: type[torch.nn.Module]) -> bool:
    code = getattr(kind.forward, "__code__", None)
    return code is not None and any("training" in each.co_names for each in with_inner_code([code]))


def tell_of_gradients(values: Sequence[object], strict: bool) -> None:
    """Say that results carry no gradients, if an argument asks for them. Weights always do, and mean nothing."""
    leaves = (
        values
        if all(isinstance(x, torch.Tensor) for x in values)
        else pytree.tree_leaves(list(values))
    )
    asks = any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    if asks and torch.is_grad_enabled():
        problem = CaptureError(
            "an argument requires grad, and what is compiled records no gradients: its results have no grad_fn, and backward() ends there",
            hint="train the model itself; for inference pass detached tensors, or call under torch.no_grad()",
        )
        tell(problem, strict=strict)
