"""Causal LMs of transformers for the command line: stitched in place, they generate tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import transformers

from piecework.integrations.protocol import LoadedModel, Outcome, config_in, model_of
from piecework.integrations.transformers import stitcher
from piecework.integrations.transformers.request.state import dry_request
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule

PROMPT_TOKENS = 8


class CausalLM(LoadedModel):
    """A causal LM of transformers, with a prompt as its example."""

    def stitch(self, config: CompilationConfig) -> StitchedModule:
        return stitcher.stitched_module(stitcher.stitch(self.module, config=config))  # type: ignore[type-var]

    def save(self, stitched: StitchedModule, artifact: Path) -> None:
        stitcher.save(self.module, artifact)  # type: ignore[arg-type]

    def warm(self, artifact: Path) -> StitchedModule:
        return stitcher.stitched_module(stitcher.load(artifact, self.module))  # type: ignore[type-var]

    def modules(self, stitched: StitchedModule) -> Sequence[StitchedModule]:
        return tuple(stitcher.how_served(self.module).modules.values())  # type: ignore[arg-type]

    def run(self, new_tokens: int, stitched: StitchedModule | None = None) -> Outcome:
        """Generate greedily with the model's own ``generate()``."""
        (prompt,) = self.example_args
        out = self.module.generate(  # type: ignore[attr-defined]
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
        return dry_request


def load(path: Path, seed: int) -> CausalLM | None:
    """The causal LM of a local folder or ``config.json``, None without one; raises `UsageError`."""
    file, fields = config_in(path)
    if not file.is_file():
        return None
    transformers.logging.set_verbosity_error()
    kind = transformers.AutoModelForCausalLM

    def make() -> torch.nn.Module:
        made: torch.nn.Module = kind.from_config(transformers.AutoConfig.for_model(**fields))
        return made

    module = model_of(kind, path, seed, make)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = module.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    prompt = torch.randint(3, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    return CausalLM(type(module).__name__, module, (prompt,), config_text=file.read_text())
