"""Why a model can't be captured, in the user's own words and line, and what is said of training."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError, PieceworkError, tell
from piecework.runtime import torch_compat
from piecework.runtime.watch.places import readable

#: Why no trace goes through a stitched module.
OPAQUE = "it calls a stitched module, which is compiled already; leave that call out, put its .model there, or allow graph breaks"
_REMEDY = (
    "move the Python construct out of forward or behind a piecework.splitting_op; docs/graph-breaks.md has what usually replaces one, "
    "and with PIECEWORK_FULL_TRACEBACK=1 Dynamo's whole explanation is shown"
)
_OWN_FAULT = (
    "call the model itself with the example arguments: it has to run with them, on one device"
)
_IN_PLACE = (
    "write tensors in place (copy_, add_, +=, an index), return what is new, or keep state behind a splitting op: a captured graph "
    "runs none of the forward's Python; where only a first call writes, call the model once before it is compiled"
)
# How Dynamo tells of an exception of the code that it traces (in 2.11 wrapped once more).
_RAISED = re.compile(
    r"""(?:raised exception|\): got) (\w+)\((?:\[ConstantVariable\(\w+: )?(['"]?)(.*?)\2(?:\)\])?,?\)$"""
    r"|debug context: (TypeError) <.+?>: (.+)$",
    re.MULTILINE,
)
_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)(?:, in (.+))?\n\s*(.*)$', re.MULTILINE)
_OURS, _TORCH, _PYTHON = (
    os.path.dirname(os.path.abspath(each)) + os.sep
    for each in (__file__, torch.__file__, os.__file__)
)


def own_error(error: BaseException) -> PieceworkError | None:
    """The typed error that Dynamo may have wrapped."""
    return next((e for e in torch_compat.causes(error) if isinstance(e, PieceworkError)), None)


def capture_error(error: BaseException) -> CaptureError:
    """What Dynamo's ``error`` means for somebody who wants a model captured."""
    text = str(error).strip()
    line, code = _user_line(text)
    fakeless = re.search(r"no fake impl.*? for (?:<CustomOpDef\()?(\w\S+::[\w.]+)", text)
    if fakeless is not None:
        why = f"the operator {fakeless[1]} has no fake implementation, which a trace needs to know its result's shape"
        hint = f'register one with @torch.library.register_fake("{fakeless[1]}")'
        return CaptureError(why, where=line, hint=hint)
    raised = _RAISED.search(text)
    if raised is not None or text.startswith("Data-dependent assertion failed"):
        said = f"AssertionError at {code}"
        if raised is not None:
            said = f"{raised[1] or raised[4]}: {raised[3] or raised[5] or ''}".removesuffix(": ")
        return CaptureError(f"the model's own forward raises {said}", where=line, hint=_OWN_FAULT)
    reason = text.splitlines()[0] if text else type(error).__name__
    if not torch_compat.dynamo_failure(error):
        reason = f"{type(error).__name__}: {reason}"
    explained = re.search(
        r"^  Explanation: (.+)$|\(reason: (.+)\)$|^\s*- (.+?\.)(?:\s|$)", text, re.M
    )
    if explained is not None:
        reason += f". {next(filter(None, explained.groups())).rstrip('.')}"
    hints = re.findall(r"^  Hint: (?!This graph break|It may be possible)(.+?)\.?$", text, re.M)
    why = f"the model can't be captured as one graph: {reason}"
    return CaptureError(why, where=line, hint="; ".join([*hints[:1], _REMEDY]))


def _user_line(text: str) -> tuple[str | None, str]:
    """``model.py:41 in forward`` of the innermost frame in a text, with its code."""
    frames = [each for each in _FRAME.findall(text) if not each[0].startswith(_OURS)]
    if not frames:
        return None, ""
    # Installed packages are the user's too, while torch and Python are not.
    outside = [f for f in frames if "-packages" in f[0] or not f[0].startswith(_PYTHON)]
    users = [each for each in outside if not each[0].startswith(_TORCH)]
    file, number, name, code = (users or frames)[-1]
    return f"{os.path.basename(file)}:{number}{f' in {name}' if name else ''}", code


def refuse_writes(
    gm: torch.fx.GraphModule, example_inputs: Sequence[object], arguments: Mapping[str, str]
) -> None:
    """Raise if the running trace wrote something that its graph does not write."""
    nodes = gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, example_inputs, strict=True)
    fakes = {id(each): node.meta["example_value"] for node, each in pairs}
    writes = torch_compat.writes_of_trace(
        lambda fake, now: torch_compat.is_same_view(fakes.get(id(now)), fake)
    )
    for place, line in writes:
        own = readable(re.sub(r"\.__dict__\['(\w+)'\]", r".\1", place), arguments)
        if place.startswith("L['model']"):
            own = f"the model's own state: {own}"
        elif place.startswith(("L['args']", "L['kwargs']")):
            own = f"its argument {own}"
        elif place.startswith("G["):
            own = f"the global {own}"
        why = f"forward changes {own or 'an object outside the graph'}, which a captured graph would not do"
        raise CaptureError(why, where=line or None, hint=_IN_PLACE)


def tell_of_training(model: object, strict: bool) -> None:
    """Say that a model is in training mode, if a module goes by that; an error where ``strict``."""
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
    """Say that results carry no gradients, if an argument asks for them; weights mean nothing."""
    plain = all(isinstance(x, torch.Tensor) for x in values)
    leaves = values if plain else pytree.tree_leaves(list(values))
    asks = any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    if asks and torch.is_grad_enabled():
        problem = CaptureError(
            "an argument requires grad, and what is compiled records no gradients: its results have no grad_fn, and backward() ends there",
            hint="train the model itself; for inference pass detached tensors, or call under torch.no_grad()",
        )
        tell(problem, strict=strict)
