"""``piecework demo``: in, nothing; out, a transformer compiled piecewise, its source shown, and its tokens compared with eager ones."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from piecework.cli.console import DIFFERS, compile_step, console, show_source, step, typed_errors


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the source; must be new.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="How many tokens to generate.")] = 32,
    backend: Annotated[str, typer.Option(help="Piece compiler: inductor or eager.")] = "inductor",
) -> None:
    """Compile an 8-layer Llama-shaped model (random weights), show the emitted source, generate, and compare with eager.

    Exit code 1 if tokens differ or logits differ by more than 1e-4 relative.
    """
    import tempfile

    from piecework.integrations.comparing import TOLERANCE, compare
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle
    from piecework.runtime.config.compilation import CompilationConfig

    out = console()
    with typed_errors():
        config = CompilationConfig(backend=backend)
        target = output or Path(tempfile.mkdtemp(prefix="piecework-demo-")) / "llama"
        bundle.check_output(target)
        spec = str(resources.files("piecework.examples") / "llama_demo.json")
        with step(out, "Building an 8-layer Llama with seeded random weights"):
            model = load_model(spec)
        with step(out, f"Generating {tokens} tokens eagerly"):
            model.run(2)  # the first call of anything is slow
            eager = model.run(tokens)
        with compile_step(out, f"Capturing, splitting and compiling with {backend}"):
            stitched = model.stitch(config)
        with step(out, f"Generating {tokens} tokens with the stitched model"):
            model.run(2, stitched)
            ours = model.run(tokens, stitched)
        bundle.save(
            target,
            stitched,
            model=spec,
            seed=0,
            config=config,
            config_text=model.config_text,
        )
        show_source(out, stitched.source.code)
        out.print(str(stitched.report()), markup=False)
        out.print(f"source: {target / bundle.SOURCE}", markup=False)
        result = compare(eager, ours)
        out.print(f"tokens: {' '.join(map(str, ours.tokens.tolist()))}", markup=False)
        out.print(
            f"tokens {'equal' if result.tokens_equal else 'DIFFER'}; "
            f"logits differ by {result.difference:.1e} relative (limit {TOLERANCE:.0e})",
            markup=False,
        )
        out.print(
            f"{tokens} tokens: eager {eager.seconds:.2f} s, stitched {ours.seconds:.2f} s",
            markup=False,
        )
    if not result.agree:
        raise typer.Exit(DIFFERS)
