"""``piecework serve``: in, a model's folder or what compile made of it; out, transformers' OpenAI-style server with the model stitched, until a signal ends it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piecework.cli.bundles import reload_model
from piecework.cli.capture import parse_sizes
from piecework.cli.console import compile_step, console, step
from piecework.cli.options import Backend, ConfigFile, Overrides, configuration
from piecework.errors import UsageError
from piecework.integrations.loading import require_model

if TYPE_CHECKING:

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from piecework.integrations.protocol import LoadedModel
    from piecework.runtime.bundle import Manifest


_WHAT_IS_SERVED = "give the local Hugging Face folder of a causal LM, or what compile made of one"


def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="A local Hugging Face folder with a tokenizer, or a folder that compile made of one.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model.", show_default="MODEL_OR_DIR")
    ] = None,
    capture: Annotated[
        str, typer.Option(help="Static graphs for batch sizes such as 1,2,4,8, or auto.")
    ] = "",
    artifact: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Load what was compiled from there; where nothing fits, compile and save it there.",
            show_default="DIR/artifact of a folder that compile made",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cuda.")] = "cpu",
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Compute requests together.")
    ] = False,
    cb_num_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Pages of its KV cache.", show_default="most of the memory"),
    ] = None,
    cb_max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a step of it.", show_default="8192")
    ] = None,
    backend: Backend = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Answer chat and completion requests from a stitched causal LM, by the server of
    `transformers serve`.

    The model is loaded and compiled, or loaded from an artifact, before the first request. GET
    /metrics is what ran, for Prometheus.
    """
    require_model(model)
    from piecework.integrations.loading import load_model
    from piecework.integrations.protocol import require_packages
    from piecework.runtime import bundle

    require_packages(("transformers", "fastapi", "uvicorn", "openai"), "serve")
    from transformers import ContinuousBatchingConfig

    from piecework.integrations.transformers import stitch
    from piecework.integrations.transformers.integration import CausalLM
    from piecework.integrations.transformers.openai_server import (
        bound_socket,
        make_server,
        tokenizer_of,
    )
    from piecework.runtime.counters import counters

    sizes = "auto" if capture == "auto" else parse_sizes(capture, "--capture") or None
    limits = {"num_blocks": cb_num_blocks, "max_batch_tokens": cb_max_batch_tokens}
    if not continuous_batching and any(limits.values()):
        raise UsageError(
            "--cb-… options are for --continuous-batching",
            hint="add --continuous-batching, or leave them out",
        )
    folder = Path(model)
    manifest = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).is_file() else None
    config = configuration(
        config_file, overrides, backend=backend, base=manifest and manifest.config
    )
    if artifact is None and manifest and not manifest.made_otherwise(config):
        artifact = str(folder / bundle.ARTIFACT)
    out = console()
    tokenizer = tokenizer_of(_weights(folder, manifest))

    def load() -> LoadedModel:
        with step(out, f"Loading {model}"):
            return reload_model(folder, manifest) if manifest else load_model(model)

    batching = ContinuousBatchingConfig(**limits) if continuous_batching else None
    waiting: list[LoadedModel] = []

    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        loaded = waiting.pop() if waiting else load()
        module = loaded.module.to(device)  # type: ignore[attr-defined]
        traced = counters.num_graphs_seen
        with compile_step(out, f"Stitching with {config.backend}"):
            stitch(module, config=config, capture=sizes, artifact=artifact)
        if artifact is not None:
            loaded_it = counters.num_graphs_seen == traced
            out.print(
                f"{'loaded from' if loaded_it else 'compiled and saved to'} {artifact}",
                markup=False,
            )
        return module, tokenizer

    with bound_socket(host, port) as listener:
        waiting.append(load())
        if not isinstance(waiting[0], CausalLM):
            raise UsageError(
                f"{model!r} is no causal LM, which answers requests", hint=_WHAT_IS_SERVED
            )
        server = make_server(name or model, make, batching=batching)
        address = f"http://{host}:{listener.getsockname()[1]}/v1"
        out.print(f"{name or model} at {address}", markup=False)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _weights(folder: Path, manifest: Manifest | None) -> Path:
    """Where the model's own files lie.

    Raises:
        UsageError: it was made from a config alone, or by a factory.
    """
    found = folder if manifest is None else Path(manifest.model)
    if manifest is None and not folder.exists() and ":" not in str(folder):
        raise UsageError(f"there is no folder {str(folder)!r}", hint=_WHAT_IS_SERVED)
    if not found.is_dir():
        raise UsageError(
            f"{str(folder)!r} is of no model that has a tokenizer", hint=_WHAT_IS_SERVED
        )
    return found
