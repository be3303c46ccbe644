"""Models named on the command line. In: a folder, a ``config.json`` or ``module:factory``. Out: a `LoadedModel`, ready to be stitched.

Nothing is downloaded: folders and configs are local, and random weights are seeded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from piecework.errors import UsageError
from piecework.runtime.compile import compile as compile_model
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what to call it with.

    Attributes:
        name: for reports.
        module: the model.
        example_args: positional example arguments (for a causal LM: token ids).
        causal_lm: True for a transformers causal LM, which generates tokens.
        config_text: the model's ``config.json``, if it has one.
    """

    name: str
    module: Callable[..., object]
    example_args: tuple[object, ...]
    causal_lm: bool
    config_text: str | None = None

    def stitch(self, config: CompilationConfig) -> StitchedModule:
        """Stitch the model; a causal LM is stitched in place."""
        if not self.causal_lm:
            return compile_model(self.module, self.example_args, config=config)
        from piecework.integrations.transformers import stitch, stitched_module

        stitch(self.module, config=config)
        return stitched_module(self.module)


def load_model(spec: str, *, seed: int = 0) -> LoadedModel:
    """Load what ``spec`` names.

    Args:
        spec: a local Hugging Face folder (weights are loaded if there are any), a ``config.json`` (random weights), or
            ``module:factory`` returning ``(module, example_inputs)``.
        seed: of the random weights and of the example prompt.

    Raises:
        UsageError: there is no such thing, or it can't be loaded; says which.
    """
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path, seed)
    if path.is_file():
        return _from_config(path, seed)
    if ":" in spec and not any(sep in spec for sep in (os.sep, "\\")):
        return _from_factory(spec, seed)
    raise UsageError(
        f"there is no model at {spec!r}",
        hint="give a local model folder, a config.json, or module:factory",
    )


def _from_folder(path: Path, seed: int) -> LoadedModel:
    config = path / "config.json"
    if not config.is_file():
        raise UsageError(f"folder {str(path)!r} has no config.json")
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    if not weights:
        return _from_config(config, seed)
    transformers = _transformers()
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"can't load the model in {str(path)!r}: {_line(error)}") from error
    return _causal_lm(module, config.read_text(), seed)


def _from_config(path: Path, seed: int) -> LoadedModel:
    transformers = _transformers()
    try:
        text = path.read_text()
        fields = json.loads(text)
        config = transformers.AutoConfig.for_model(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{str(path)!r} is not a model config: {_line(error)}",
            hint="it must be the config.json of a transformers causal LM, with its model_type",
        ) from error
    torch.manual_seed(seed)
    try:
        module = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{str(path)!r} is not a causal LM: {_line(error)}") from error
    return _causal_lm(module, text, seed)


def _causal_lm(module: torch.nn.Module, config_text: str, seed: int) -> LoadedModel:
    module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = module.config.get_text_config().vocab_size
    prompt = torch.randint(3, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    return LoadedModel(type(module).__name__, module, (prompt,), True, config_text)


def _from_factory(spec: str, seed: int) -> LoadedModel:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module is beside them
    torch.manual_seed(seed)
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"there is no factory {spec!r}: {_line(error)}") from error
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise UsageError(
            f"factory {spec!r} must return (module, example_inputs)",
            hint="example_inputs is a tuple of positional arguments",
        )
    module, example = made
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return LoadedModel(type(module).__name__, module, args, False)


def _transformers():  # type: ignore[no-untyped-def]
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "this model needs transformers, which is not installed",
            hint="pip install 'piecework[transformers]'",
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
