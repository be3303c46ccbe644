"""transformers' causal LMs for the command line. In: a local folder or a ``config.json``. Out: a `LoadedModel` that is stitched in place and generates tokens.

Nothing is downloaded; random weights and the example prompt are seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from piecework.errors import UsageError
from piecework.integrations.protocol import LoadedModel, Outcome, first_line, with_weights
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

PROMPT_TOKENS = 8


class CausalLM:
    """A causal LM of transformers; see `piecework.integrations.protocol.Integration`."""

    def load(self, path: Path, seed: int) -> LoadedModel | None:
        config = path / "config.json" if path.is_dir() else path
        if not config.is_file():
            return None
        if path.is_dir() and any(any(path.glob(kind)) for kind in ("*.safetensors", "*.bin")):
            return self._with_weights(path, config, seed)
        return self._with_random_weights(config, seed)

    def _with_weights(self, path: Path, config: Path, seed: int) -> LoadedModel:
        transformers = _transformers()
        module = with_weights(transformers.AutoModelForCausalLM, path)
        return self._loaded(module, config.read_text(), seed)

    def _with_random_weights(self, path: Path, seed: int) -> LoadedModel:
        transformers = _transformers()
        try:
            text = path.read_text()
            fields = json.loads(text)
            config = transformers.AutoConfig.for_model(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{str(path)!r} is not a model config: {first_line(error)}",
                hint="it must be the config.json of a transformers causal LM, with its model_type",
            ) from error
        torch.manual_seed(seed)
        try:
            module = transformers.AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"{str(path)!r} is not a causal LM: {first_line(error)}",
                hint="for another kind of model write module:factory",
            ) from error
        return self._loaded(module, text, seed)

    def _loaded(self, module: torch.nn.Module, config_text: str, seed: int) -> LoadedModel:
        module.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = module.config.get_text_config().vocab_size
        prompt = torch.randint(3, vocabulary, (1, PROMPT_TOKENS), generator=generator)
        return LoadedModel(type(module).__name__, module, (prompt,), self, config_text)

    def stitch(self, loaded: LoadedModel, config: CompilationConfig) -> StitchedModule:
        from piecework.integrations.transformers import stitch, stitched_module

        stitch(loaded.module, config=config)
        return stitched_module(loaded.module)

    def save(self, loaded: LoadedModel, stitched: StitchedModule, artifact: Path) -> None:
        from piecework.integrations.transformers import save

        save(loaded.module, artifact)

    def modules(self, loaded: LoadedModel, stitched: StitchedModule) -> Sequence[StitchedModule]:
        from piecework.integrations.transformers import how_served

        return tuple(how_served(loaded.module).modules.values())

    def warm(self, loaded: LoadedModel, artifact: Path) -> StitchedModule:
        from piecework.integrations.transformers import load, stitched_module

        return stitched_module(load(artifact, loaded.module))

    def run(
        self, loaded: LoadedModel, new_tokens: int, stitched: StitchedModule | None = None
    ) -> Outcome:
        """Generate greedily with the model's own ``generate()``."""
        (prompt,) = loaded.example_args
        out = loaded.module.generate(  # type: ignore[attr-defined]
            prompt,
            attention_mask=torch.ones_like(prompt),  # type: ignore[arg-type]
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack([step[0] for step in out.logits])
        return Outcome(out.sequences[0, prompt.shape[1] :], (logits,))  # type: ignore[attr-defined]

    def dry_context(self) -> Callable[..., AbstractContextManager[object]]:
        from piecework.integrations.transformers.request.dry import dry_request

        return dry_request


INTEGRATION = CausalLM()


def _transformers():  # type: ignore[no-untyped-def]
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "this model needs transformers, which is not installed",
            hint="pip install 'transformers>=5.17'",
        ) from error
    transformers.logging.set_verbosity_error()
    return transformers
