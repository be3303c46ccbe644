"""transformers' generating families: greedy tokens and scores of a small model, also stitched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch

from piecework.bench.lists.families import small_config, small_model
from piecework.bench.lists.sample import Row
from piecework.bench.lists.shrink import LEVELS, VOCABULARY
from piecework.bench.lists.trial import Heard, Options, Outcome, Status, Verdict
from piecework.errors import PieceworkError
from piecework.integrations.protocol import first_line

PROMPT, NEW = (2, 7), 6  # sequences and tokens of the prompt; tokens to generate


@dataclass(frozen=True, slots=True)
class Family:
    """A family to generate with; ``pair``: as the encoder-decoder that it is."""

    name: str
    pair: bool = False


def causal_lms() -> list[Row]:
    """The families that transformers' registry has a causal LM of."""
    from transformers.models.auto import modeling_auto

    names = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [Row("causal LMs", name, partial(Family, name)) for name in names]


def encoder_decoders() -> list[Row]:
    """The sequence-to-sequence families of transformers that are encoder-decoders."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    names = sorted(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    # A model of two others has no config of its own.
    configs = (AutoConfig.for_model(name) for name in names if name != "encoder-decoder")
    pairs = [each.model_type for each in configs if each.is_encoder_decoder]
    return [Row("encoder-decoders", name, partial(Family, name, True)) for name in pairs]


def try_family(family: Family, options: Options, heard: Heard = lambda _: None) -> Outcome:
    """Generate with a small model as it is and stitched."""
    from piecework.integrations.transformers import how_served, stitch, stitched_module

    heard("eager")
    outcome, reason = Outcome(), ""
    for level in range(len(LEVELS)):
        try:
            model = _made(family, level)
            want = _generated(model)
            break
        except Exception as error:  # noqa: BLE001 - a config that doesn't fit its model
            reason = reason or _line(error)
    else:
        outcome.skipped = reason
        return outcome

    def found(status: Status, why: str) -> Outcome:
        outcome.verdicts["piecework"] = Verdict(status, why)
        return outcome

    heard("piecework")
    try:
        stitch(model, config=options.config())
        report = stitched_module(model).report()
        got = _generated(model)
    except PieceworkError as error:
        return found("refused", _line(error))
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        return found("failed", _line(error))
    served = how_served(model)
    outcome.way, outcome.pieces, outcome.unique = served.way, report.pieces, report.unique
    if not torch.equal(want.sequences, got.sequences):
        return found("wrong", "other tokens")
    for step, (mine, eagers) in enumerate(zip(got.scores, want.scores, strict=True)):
        if not torch.allclose(mine, eagers, rtol=1e-3, atol=1e-3, equal_nan=True):
            worst = (mine - eagers).abs().max().item()
            return found("wrong", f"scores of token {step} differ by {worst:g}")
    return found(
        "equal", "; ".join(f"{n} calls as they are: {why}" for why, n in served.as_it_is.items())
    )


def _made(family: Family, level: int) -> torch.nn.Module:
    import transformers

    config = small_config(family.name, level)
    if family.pair and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 2
    kind = "AutoModelForSeq2SeqLM" if family.pair else "AutoModelForCausalLM"
    model = small_model(getattr(transformers, kind).from_config, config, 0)
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
