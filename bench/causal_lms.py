"""transformers' causal LMs and encoder-decoders, stitched. In: transformers' registries. Out: for each family whether a small model runs, is taken, and generates eager's tokens; as a page of the documentation.

Nothing is timed. Each family has a process of its own. The exit code is 1 if one gives other tokens or fails with an error that
nobody meant.

Run it with ``piecework bench causal_lms``, with ``--encoder-decoders`` for those, or ``python -m piecework.bench.causal_lms``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from piecework.bench.lists.families import quiet, small_config, small_model
from piecework.bench.lists.page import table
from piecework.bench.lists.shrink import LEVELS, VOCABULARY
from piecework.bench.measure.apart import apart
from piecework.bench.measure.result import machine
from piecework.errors import PieceworkError
from piecework.integrations.protocol import first_line
from piecework.runtime.store.files import write_atomic

PROMPT, NEW = (2, 7), 6  # sequences and tokens of the prompt; tokens to generate
LIMIT = 240.0  # seconds for one family


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one family.

    Attributes:
        status: "equal", "refused" by name, "wrong", "failed" with an error that nobody meant, or "no model": no small one runs.
        way: in which it is served.
        pieces, unique: of the stitched decoder; of its prompts' forward if it is served whole.
        why: the reason, one line.
    """

    family: str
    status: str
    way: str = ""
    pieces: int = 0
    unique: int = 0
    why: str = ""


def families() -> list[str]:
    """The families that transformers' registry has a causal LM of."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def encoder_decoders() -> list[str]:
    """The families of transformers' registry of sequence-to-sequence models that are encoder-decoders."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    names = sorted(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    # A model of two others has no config of its own.
    found = (AutoConfig.for_model(name) for name in names if name != "encoder-decoder")
    return [each.model_type for each in found if each.is_encoder_decoder]


def try_family(family: str, backend: str, pair: bool = False) -> Found:
    """Generate with a small model as it is and stitched; greedy tokens and the scores of each must be equal.

    Args:
        pair: take the encoder-decoder of a family that may have a causal LM too.
    """
    from piecework.integrations.transformers import how_served, stitch, stitched_module
    from piecework.runtime.config.compilation import CompilationConfig

    reason = ""
    for level in range(len(LEVELS)):
        with quiet():
            try:
                model = (_pair if pair else _model)(family, level)
                want = _generated(model)
                break
            except Exception as error:  # noqa: BLE001 - a config that doesn't fit its model
                reason = reason or _line(error)
    else:
        return Found(family, "no model", why=reason)
    try:
        stitch(model, config=CompilationConfig(backend=backend))
        report = stitched_module(model).report()
        got = _generated(model)
    except PieceworkError as error:
        return Found(family, "refused", why=_line(error))
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        return Found(family, "failed", why=_line(error))
    served = how_served(model)
    counts = (served.way, report.pieces, report.unique)
    if not torch.equal(want.sequences, got.sequences):
        return Found(family, "wrong", *counts, why="other tokens")
    for step, (mine, eagers) in enumerate(zip(got.scores, want.scores, strict=True)):
        if not torch.allclose(mine, eagers, rtol=1e-3, atol=1e-3, equal_nan=True):
            worst = (mine - eagers).abs().max().item()
            return Found(
                family, "wrong", *counts, why=f"scores of token {step} differ by {worst:g}"
            )
    left = "; ".join(f"{n} calls as they are: {why}" for why, n in served.as_it_is.items())
    return Found(family, "equal", *counts, why=left)


def _model(family: str, level: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = small_model(AutoModelForCausalLM.from_config, small_config(family, level), 0)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


def _pair(family: str, level: int) -> torch.nn.Module:
    from transformers import AutoModelForSeq2SeqLM

    config = small_config(family, level)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 2
    model = small_model(AutoModelForSeq2SeqLM.from_config, config, 0)
    how = model.generation_config
    how.eos_token_id = how.forced_eos_token_id = how.forced_bos_token_id = None  # type: ignore[union-attr]
    how.num_beams = 1  # type: ignore[union-attr]
    return model


def _generated(model):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 3, PROMPT)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _line(error: BaseException) -> str:
    """The error in one line, without what differs from run to run."""
    said = f"{type(error).__name__}: {first_line(error)}"
    return re.sub(r" ?\(/[^)]*\)|0x[0-9a-f]+", "", said)[:400]


def run(chosen: Sequence[str], backend: str, pair: bool) -> Iterator[Found]:
    """Try each family in a process of its own."""
    for family in chosen:
        arguments = [family, "--backend", backend, *["--encoder-decoders"] * pair]
        try:
            yield Found(**apart("piecework.bench.causal_lms", arguments, limit=LIMIT))
        except PieceworkError as error:
            yield Found(family, "failed", why=error.message)


_PAGES = {
    False: (
        "Causal LMs",
        "family of transformers' registry",
        "--page docs/causal-lms.md",
        "causal_lms.json",
    ),
    True: (
        "Encoder-decoders",
        "encoder-decoder of transformers' registry of sequence-to-sequence models",
        "--encoder-decoders --page docs/encoder-decoders.md",
        "encoder_decoders.json",
    ),
}


def markdown(found: Sequence[Found], backend: str, pair: bool) -> str:
    """The page of the documentation."""
    counts = Counter(each.status for each in found)
    ways = Counter(each.way for each in found if each.status == "equal")
    run_eagerly = len(found) - counts["no model"]
    about = machine()
    import transformers

    title, of, call, _ = _PAGES[pair]
    lines = [
        f"# {title} of transformers",
        "",
        f"Each {of}, as a small model with seeded weights: `generate` with the model as it is and stitched, greedy, two prompts of",
        f"seven tokens, six tokens more; tokens and scores are compared. `piecework bench causal_lms {call}` writes this page.",
        "",
        f"transformers {transformers.__version__}, torch {about['torch']}, pieces compiled by `{backend}`. Of {len(found)} families {run_eagerly} have a small model",
        f"that generates; **{counts['equal']} of these are equal** ({ways['flat']} served flat, {ways['whole']} whole: [the two ways](transformers.md#two-ways)), {counts['refused']} are refused by name,",
        f"{counts['wrong']} are wrong, {counts['failed']} fail otherwise.",
        "",
        *table(("families", "", "way", "pieces", "different", "note"), map(_cells, found)),
    ]
    return "\n".join(lines) + "\n"


def _cells(found: Found) -> list[str]:
    counted = [str(found.pieces), str(found.unique)] if found.pieces else ["", ""]
    # Why there is no small model is in the JSON.
    why = "" if found.status == "no model" else found.why.replace("|", "\\|").replace("<", "&lt;")
    return [found.family, found.status, found.way, *counted, why]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the families; returns 1 if one is wrong or fails."""
    parser = argparse.ArgumentParser(prog="piecework bench causal_lms", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument(
        "--only", default="", help="only families whose name this regular expression finds"
    )
    parser.add_argument("--backend", default="eager", help="what compiles the pieces")
    parser.add_argument(
        "--kept",
        type=Path,
        help="JSON of an earlier run, whose families that --only leaves out are taken over",
    )
    parser.add_argument(
        "--encoder-decoders", action="store_true", help="these in place of causal LMs"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    pair = chosen.encoder_decoders
    if chosen.one is not None:
        print(json.dumps(asdict(try_family(chosen.one, chosen.backend, pair))))
        return 0
    names = [
        name for name in (encoder_decoders if pair else families)() if re.search(chosen.only, name)
    ]
    found = []
    kept = [] if chosen.kept is None else json.loads(chosen.kept.read_text())
    kept = [Found(**row) for row in kept if row["family"] not in names]
    for each in run(names, chosen.backend, pair):
        found.append(each)
        print(f"{len(found)}/{len(names)} {each.family}: {each.status} {each.why}", flush=True)
        if chosen.out is not None:
            chosen.out.mkdir(parents=True, exist_ok=True)
            data = [asdict(row) for row in found]
            text = json.dumps(data, indent=1) + "\n"
            write_atomic(chosen.out / _PAGES[pair][-1], text.encode())
    if chosen.page is not None:
        rows = sorted([*kept, *found], key=lambda each: each.family)
        write_atomic(chosen.page, markdown(rows, chosen.backend, pair).encode())
    return 1 if any(each.status in ("wrong", "failed") for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
