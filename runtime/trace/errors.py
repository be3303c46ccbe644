"""Why a model can't be captured: a typed error with the user's own words and line, of what was raised while Dynamo traced.

It tells apart errors of piecework's own, of the model's code, and of Dynamo.
"""

from __future__ import annotations

import os
import re

import torch

from piecework.errors import CaptureError, PieceworkError
from piecework.runtime import torch_compat

#: Why no trace goes through a stitched module.
OPAQUE = "it calls a stitched module, which is compiled already; leave that call out, or allow graph breaks"
_REMEDY = "move the Python construct out of forward or behind a piecework.splitting_op"
_MORE = (
    "; docs/graph-breaks.md has what usually replaces one, "
    "and with PIECEWORK_FULL_TRACEBACK=1 Dynamo's whole explanation is shown"
)
# What to write in place of what Dynamo stops at, by a word of its explanation; the first that is found.
_REMEDIES = (
    (
        r"(?s)data-dependent.*(nn/modules/transformer\.py|multi_head_attention_forward)",
        "torch looks at the mask's values to see whether it is causal: pass is_causal=True beside "
        "a causal mask (tgt_is_causal=True to nn.Transformer)",
    ),
    (
        r"pack_padded_sequence|pad_packed_sequence|PackedSequence",
        "run the layer over the padded batch, and gather each row's last state by its length",
    ),
    (
        r"[Dd]ata-dependent",
        "choose by torch.where, or by torch.cond where one side is dear; read a size that data "
        "decides outside of forward, or behind a piecework.splitting_op",
    ),
    (r"tolist|numpy", "stay in torch, or do it behind a piecework.splitting_op"),
    (r"Random\.random|`time\.|datetime", "pass the number as an argument"),
    (r"deepcopy", "clone the tensor"),
    # Dynamo names `print` as an example, "(e.g. `print`)", beside builtins of every kind.
    (
        r"(?<!e\.g\. )`print`|Logg|`warnings\.",
        "print and log only if not torch.compiler.is_compiling()",
    ),
    (
        r"torch\.compiler\.disable",
        "leave torch.compiler.disable out there, or put the call behind a piecework.splitting_op",
    ),
)
_OWN_FAULT = "call the model itself with the example arguments: it has to run with them"
_MARKED = re.compile(
    r"You marked L\['k?w?args'\]\[(.+?)\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)"
)
_ONE_DEVICE = "move the model and its arguments to one device"
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PYTHON = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


def own_error(error: BaseException) -> PieceworkError | None:
    """The typed error that Dynamo may have wrapped."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, PieceworkError):
            return current
        inner = getattr(current, "inner_exception", None)
        current = inner or current.__cause__ or current.__context__
    return None


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
    raised = _raised_by_model(error, text)
    if raised is None and text.startswith("Data-dependent assertion failed"):
        raised = f"AssertionError at {code}"
    two_devices = re.search(
        r"device mismatch|on the same device|different devices|expected device", text
    )
    if raised is not None:
        hint = _ONE_DEVICE if two_devices else _OWN_FAULT
        return CaptureError(f"the model's own forward raises {raised}", where=line, hint=hint)
    opaque = re.search(r"\(reason: (.+)\)$", text, re.MULTILINE)
    if text.startswith("Skip inlining") and opaque is not None:
        return CaptureError(
            f"the model can't be captured as one graph: {opaque[1]}",
            where=line,
            hint="put its .model there" if opaque[1] == OPAQUE else _remedy(text),
        )
    unknown = re.match(r"ModuleNotFoundError: No module named '(.+)'", text)
    if unknown is not None:
        return CaptureError(
            f"the model's code is of a module {unknown[1]} that can't be imported, which is how Dynamo finds what the code reads",
            where=line,
            hint=f'put the module into sys.modules["{unknown[1]}"] before it is executed',
        )
    reason = text.splitlines()[0] if text else type(error).__name__
    if not torch_compat.dynamo_failure(error):
        reason = f"{type(error).__name__}: {reason}"
    marked = _MARKED.search(text)
    if marked is not None:
        return CaptureError(
            f"dimension {marked[2]} of argument {marked[1]} is marked as dynamic, and the model's code fixes it to {marked[3]}",
            where=line,
            hint="leave the mark out, or change what fixes the size",
        )
    violated = re.search(r"^\s*- (.+?\.)(?:\s|$)", text, re.MULTILINE)
    if "Constraints violated" in reason and violated is not None:
        reason = violated[1].rstrip(".")
    explained = re.search(r"^  Explanation: (.+)$", text, re.MULTILINE)
    if explained is not None:
        reason += f". {explained[1].rstrip('.')}"
    return CaptureError(
        f"the model can't be captured as one graph: {reason}",
        where=line,
        hint=_ONE_DEVICE if two_devices else _remedy(text),
    )


def _remedy(text: str) -> str:
    """What to write in place of what Dynamo's ``text`` stops at."""
    found = (cure for words, cure in _REMEDIES if re.search(words, text))
    return next(found, _REMEDY) + _MORE


def _raised_by_model(error: BaseException, text: str) -> str | None:
    """The exception that the model's code raised, as ``ValueError: text``; None if it raised none."""
    found = re.search(r"Developer debug context: raised exception (\w+)\((.*)\)$", text, re.M)
    if found is not None:
        return f"{found[1]}: {_unquoted(found[2])}".removesuffix(": ")
    found = re.search(r"Developer debug context: TypeError <.+?>: (.+)$", text, re.M)
    if found is not None and text.startswith("TypeError when making fake tensor call"):
        return f"TypeError: {found[1].replace('immutable_list', 'list')}"
    found = re.search(r"\): got (\w+)\((.*)\)$", text, re.M)
    if found is not None and "with fake tensors" in text:
        return f"{found[1]}: {_unquoted(found[2])}"
    return None


def _unquoted(text: str) -> str:
    """The text of a string literal that stands for a single argument; anything else as it is."""
    text = text.rstrip(",")
    wrapped = re.fullmatch(r"\[ConstantVariable\(\w+: (.*)\)\]", text)  # as torch 2.11 has it
    text = wrapped[1] if wrapped else text
    for quote in ("'", '"'):
        if len(text) > 1 and text[0] == text[-1] == quote:
            return text[1:-1].replace(f"\\{quote}", quote).replace("\\n", " ")
    return text


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
    if not frames:
        return None, ""
    own = [each for each in frames if not _of_a_library(each[1][1])]
    number, found = (own or frames)[-1]
    code = lines[number + 1].strip() if number + 1 < len(lines) else ""
    inside = f" in {found[3]}" if found[3] else ""
    return f"{os.path.basename(found[1])}:{found[2]}{inside}", code


def _of_a_library(path: str) -> bool:
    """Whether a file is torch's or Python's own; models of installed packages are the user's."""
    return path.startswith(_TORCH) or (path.startswith(_PYTHON) and "-packages" not in path)
