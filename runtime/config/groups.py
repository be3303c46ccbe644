"""The groups and enumerations of the configuration, and what its fields take."""

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from piecework.errors import ConfigError, ConfigProblem, short_methods
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import LARGEST
from piecework.runtime.config import model
from piecework.runtime.config.model import FrozenMap, FrozenModel, key, no_key

_OP_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def _as_list(value: Any) -> Any:
    """A comma-separated string or a lone number, as one writes it on a command line, as a list."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        return [int(part) if part.isdecimal() else part for part in parts]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value


def _sorted_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers ascending, then names; each once."""
    return tuple(sorted(set(values), key=lambda each: (isinstance(each, str), each)))


def _each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"given more than once: {', '.join(map(str, twice))}")
    return tuple(sorted(values))


def _op_name(value: Any) -> str:
    """The name of an op given by name, overload, packet or handle of `piecework.splitting_op`."""
    value = getattr(value, "splitting_op_name", value)
    # torch prints an overload as ns.op.overload and a packet as ns.op
    text = value if isinstance(value, str) else str(value).replace(".", "::", 1)
    if not _OP_NAME.fullmatch(text):
        raise ValueError(f"an op is written ns::op or ns::op.overload, not {value!r}")
    return text


def _custom_ops(rules: tuple[str, ...]) -> tuple[str, ...]:
    ops = [rule[1:] for rule in dict.fromkeys(rules) if rule not in ("all", "none")]
    known = all(re.fullmatch(r"all|none|[+-][\w.:]+", rule) for rule in rules)
    if not known or len(set(ops)) < len(ops) or rules.count("all") + rules.count("none") > 1:
        given = ", ".join(map(repr, rules))
        raise ValueError(
            f"takes one of 'all' and 'none', and '+op' or '-op' for an op, not {given}"
        )
    return tuple(dict.fromkeys(rules))


def _passes(value: Mapping[str, Any]) -> FrozenMap:
    for name, each in value.items():
        if not (model.QUALIFIED_NAME.fullmatch(each) if isinstance(each, str) else callable(each)):
            raise ValueError(f"{name!r} must be a callable or a qualified name, not {each!r}")
    return FrozenMap(value)


def _passes_by_name(value: Mapping[str, Any]) -> dict[str, str]:
    return {slot: model.qualified_name(each) for slot, each in value.items()}


def parsed_by(parse: Callable[[Any], enum.Enum]) -> BeforeValidator:
    """A field's validator that asks ``parse``, which raises `ConfigError`."""

    def validate(value: Any) -> enum.Enum:
        try:
            return parse(value)
        except ConfigError as error:
            raise ValueError("; ".join(filter(None, (error.message, error.hint)))) from None

    return BeforeValidator(validate)


_LISTED = BeforeValidator(_as_list)
Natural = Annotated[int, Field(strict=True, ge=0)]
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
Size = Annotated[int, Field(strict=True, gt=0, le=LARGEST)]
Sizes = Annotated[tuple[Size, ...], _LISTED, AfterValidator(_sorted_unique)]
Endpoints = Annotated[tuple[PositiveInt, ...], _LISTED, AfterValidator(_each_once)]
CompileSizes = Annotated[
    tuple[Size | Literal["cudagraph_capture_sizes"], ...], _LISTED, AfterValidator(_sorted_unique)
]
OpNames = Annotated[tuple[Annotated[str, BeforeValidator(_op_name)], ...], _LISTED]
CustomOps = Annotated[tuple[str, ...], _LISTED, AfterValidator(_custom_ops)]
Options = Annotated[
    Mapping[str, Any], AfterValidator(FrozenMap), PlainSerializer(model.thaw, when_used="json")
]
Passes = Annotated[
    Mapping[str, Any],
    AfterValidator(_passes),
    PlainSerializer(_passes_by_name, when_used="json"),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
BackendName = Annotated[str, Field(pattern=rf"^([A-Za-z_]\w*|{model.QUALIFIED_NAME.pattern})$")]


class CompilationMode(enum.IntEnum):
    """How a model is compiled; the numbers and the first three names are the field's."""

    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    PIECEWORK_COMPILE = 3

    def __str__(self) -> str:
        return self.name


def _mode(value: Any) -> CompilationMode:
    """The mode with this number or name, in any case; VLLM_COMPILE is PIECEWORK_COMPILE."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        name = str(int(value) if isinstance(value, int) else value.strip().upper())
        for mode in CompilationMode:
            if name in (mode.name, str(mode.value)) or (mode == 3 and name == "VLLM_COMPILE"):
                return mode
    names = ", ".join(f"{mode.name} ({mode.value})" for mode in CompilationMode)
    raise ValueError(f"no compilation mode {value!r}; use {names}")


class DynamicShapesType(enum.StrEnum):
    """How Dynamo represents a dynamic dimension."""

    AUTO = "auto"
    BACKED = "backed"
    UNBACKED = "unbacked"
    BACKED_SIZE_OBLIVIOUS = "backed_size_oblivious"


_BY_NAME = PlainSerializer(lambda value: value.name, when_used="json")
_MODES: Any = {"enum": [*CompilationMode.__members__, "VLLM_COMPILE", *map(int, CompilationMode)]}
_GRAPH_MODES: Any = {"enum": list(CUDAGraphMode.__members__)}
ModeField = Annotated[CompilationMode, BeforeValidator(_mode), _BY_NAME, WithJsonSchema(_MODES)]
CUDAGraphModeField = Annotated[
    CUDAGraphMode, parsed_by(CUDAGraphMode.parse), _BY_NAME, WithJsonSchema(_GRAPH_MODES)
]


class StitchingConfig(FrozenModel):
    """The levers of the stitched function and its entry; one that is off is slower, no more."""

    bind_weights: bool = key(True, "Bind the weights once instead of passing them per call.")
    direct_splitting_ops: bool = key(
        True, "Call a splitting op past the dispatcher, where that is equivalent."
    )
    direct_artifact_entry: bool = key(True, "Call a piece's inner entry, not its public wrapper.")
    check_inputs: bool = key(True, "Check each call's inputs against what the trace assumed.")
    emit_del: bool = key(True, "Write `del` after the last use of a value, to free memory early.")


class DynamicShapesConfig(FrozenModel):
    """How dynamic dimensions are traced and what is done with the guards on them."""

    if TYPE_CHECKING:  # fields take more than what they hold: a list, a name

        def __init__(self, **fields: Any) -> None: ...

    type: DynamicShapesType = key(
        DynamicShapesType.AUTO,
        "`auto`: every size is served, by one trace or by several, as calls need them; the others "
        "make one: `backed`: symbols with a hint, not for sizes 0 and 1; `unbacked`: no hint, so "
        "nothing is specialised; `backed_size_oblivious`: a hint, sizes 0 and 1 are not special.",
    )
    evaluate_guards: bool = key(
        False, "Check each call's sizes against Dynamo's guards, also without `check_inputs`."
    )
    max_traces: int = no_key(
        8, "Traces that calls get by themselves under `auto`; `sizes=...` asks for others.", ge=1
    )


class PassConfig(FrozenModel):
    """What a user's passes need of the compilation; the passes themselves are `inductor_passes`."""

    fuse_attn_quant: bool = key(
        False, "A user pass fuses attention with what follows, so it stays in the graph."
    )
    enable_sp: bool = key(
        False, "A user pass cuts the sequence over ranks, so captured sizes are their multiples."
    )
    report_matches: bool = no_key(False, "Report how often each pass matched.")


@short_methods
class RuntimeConfig(FrozenModel):
    """What the parts read of the program around the model: batch limits, ranks, dtype, name."""

    if TYPE_CHECKING:  # fields take more than what they hold: a list, a name

        def __init__(self, **fields: Any) -> None: ...

    max_num_batched_tokens: int = key(
        8192, "The most tokens in one forward; the end of the last range.", ge=1
    )
    max_num_seqs: int = no_key(256, "The most requests in one forward.", ge=1)
    uniform_decode_query_len: int = no_key(
        1, "Query tokens of a request in a decode batch (1 plus the speculated).", ge=1
    )
    further_decode_query_lens: Sizes = no_key(
        (), "Narrower query lengths of decode batches, where the draft's width varies."
    )
    enable_lora: bool = no_key(
        False, "Adapters may be active, so captured graphs are kept apart by it."
    )
    rank: int = no_key(0, "This process among the `world_size` of one replica.", ge=0)
    dp_rank: int = no_key(0, "This replica's number among the data-parallel ones.", ge=0)
    world_size: int = key(1, "Processes of one replica: collectives span them.", ge=1)
    tensor_parallel_size: int = key(1, "Ranks that one layer is cut over.", ge=1)
    data_parallel_size: int = no_key(1, "How many replicas run side by side.", ge=1)
    dtype: str = key(
        "",
        "The model's dtype, by torch's name: an error where none of its weights has it. Empty asks "
        "nothing of them.",
        pattern=r"^([a-z][a-z0-9_]*)?$",
    )
    model_name: str = no_key("", "The model's name in reports and folders.")

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Every query length of a decode batch, ascending."""
        return tuple(sorted({self.uniform_decode_query_len, *self.further_decode_query_lens}))

    def conflicts(self) -> Iterator[ConfigProblem]:
        tokens, widest = "max_num_batched_tokens", "uniform_decode_query_len"
        for lower, upper in (
            ("rank", "world_size"),
            ("dp_rank", "data_parallel_size"),
            (widest, tokens),
            ("max_num_seqs", tokens),
        ):
            number, limit = getattr(self, lower), getattr(self, upper)
            if number > limit or (number == limit and "rank" in lower):
                yield ConfigProblem(f"{lower}, {upper}", f"{number} is too many for {limit}")
        if max(self.query_lens) > self.uniform_decode_query_len:
            why = f"{self.uniform_decode_query_len} must be the widest of {self.query_lens}"
            yield ConfigProblem(f"further_decode_query_lens, {widest}", why)
        if self.world_size % self.tensor_parallel_size:
            why = f"{self.world_size} ranks are no multiple of {self.tensor_parallel_size}"
            yield ConfigProblem("world_size, tensor_parallel_size", why)
