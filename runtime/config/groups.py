"""The groups and enumerations of the configuration, and what its fields take."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from piecework.errors import ConfigError, ConfigProblem, short_methods
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import LARGEST
from piecework.runtime.config.model import KEY, FrozenMap, FrozenModel, ignored, thaw
from piecework.runtime.config.qualified_name import QUALIFIED_NAME, qualified_name

_OP_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")

# --- what fields take ----------------------------------------------------------------------------


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
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"given more than once: {', '.join(map(str, twice))}")
    return tuple(sorted(values))


def _op_name(value: Any) -> str:
    """The name of an op given by name, overload, packet or handle of `piecework.splitting_op`.

    torch prints an overload as ``ns.op.overload`` and a packet as ``ns.op``.
    """
    value = getattr(value, "splitting_op_name", value)
    text = value if isinstance(value, str) else str(value).replace(".", "::", 1)
    if not _OP_NAME.fullmatch(text):
        raise ValueError(f"an op is written ns::op or ns::op.overload, not {value!r}")
    return text


def _custom_ops(rules: tuple[str, ...]) -> tuple[str, ...]:
    """Check ``all``/``none``/``+op``/``-op``; every fault is named."""
    bases = [rule for rule in rules if rule in ("all", "none")]
    faults = [
        f"{rule!r} is not 'all', 'none', '+op' or '-op'"
        for rule in rules
        if rule not in bases and not re.fullmatch(r"[+-][\w.:]+", rule)
    ]
    if len(bases) > 1:
        faults.append(f"{' and '.join(map(repr, bases))} are both given")
    both = sorted({rule[1:] for rule in rules if rule[0] == "+" and f"-{rule[1:]}" in rules})
    faults += [f"'+{name}' and '-{name}' are both given" for name in both]
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(dict.fromkeys(rules))


def _passes(value: Mapping[str, Any]) -> FrozenMap:
    for name, each in value.items():
        if not (QUALIFIED_NAME.fullmatch(each) if isinstance(each, str) else callable(each)):
            raise ValueError(f"{name!r} must be a callable or a qualified name, not {each!r}")
    return FrozenMap(value)


def _passes_by_name(value: Mapping[str, Any]) -> dict[str, str]:
    return {slot: qualified_name(each) for slot, each in value.items()}


def parsed_by(parse: Callable[[Any], enum.Enum]) -> BeforeValidator:
    def validate(value: Any) -> enum.Enum:
        try:
            return parse(value)
        except ConfigError as error:
            raise ValueError("; ".join(filter(None, (error.message, error.hint)))) from None

    return BeforeValidator(validate)


_LISTED = BeforeValidator(_as_list)
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
Size = Annotated[int, Field(strict=True, gt=0, le=LARGEST)]
Sizes = Annotated[tuple[Size, ...], _LISTED, AfterValidator(_sorted_unique)]
Endpoints = Annotated[tuple[PositiveInt, ...], _LISTED, AfterValidator(_each_once)]
CompileSizes = Annotated[
    tuple[Size | Literal["cudagraph_capture_sizes"], ...], _LISTED, AfterValidator(_sorted_unique)
]
OpName = Annotated[str, BeforeValidator(_op_name)]
OpNames = Annotated[tuple[OpName, ...], _LISTED]
CustomOps = Annotated[tuple[str, ...], _LISTED, AfterValidator(_custom_ops)]
Options = Annotated[
    Mapping[str, Any], AfterValidator(FrozenMap), PlainSerializer(thaw, when_used="json")
]
Passes = Annotated[
    Mapping[str, Any],
    AfterValidator(_passes),
    PlainSerializer(_passes_by_name, when_used="json"),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
BackendName = Annotated[str, Field(pattern=rf"^([A-Za-z_]\w*|{QUALIFIED_NAME.pattern})$")]

# --- modes ---------------------------------------------------------------------------------------


class CompilationMode(enum.IntEnum):
    """How a model is compiled; the numbers and the first three names are the field's."""

    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    PIECEWORK_COMPILE = 3

    @classmethod
    def parse(cls, value: CompilationMode | int | str) -> CompilationMode:
        """The mode with this number or name (any case; VLLM_COMPILE is PIECEWORK_COMPILE).

        Raises:
            ConfigError: nothing has that name or number; the message lists both.
        """
        if isinstance(value, str):
            name = value.strip().upper()
            name = "PIECEWORK_COMPILE" if name == "VLLM_COMPILE" else name
            if name in cls.__members__:
                return cls[name]
            value = int(name) if name.isdecimal() else value
        if isinstance(value, int) and not isinstance(value, bool) and value in range(len(cls)):
            return cls(value)
        names = ", ".join(f"{mode.name} ({mode.value})" for mode in cls)
        raise ConfigError(f"no compilation mode {value!r}; use {names}", where="mode")

    def __str__(self) -> str:
        return self.name


class DynamicShapesType(enum.StrEnum):
    """How Dynamo represents a dynamic dimension."""

    AUTO = "auto"
    BACKED = "backed"
    UNBACKED = "unbacked"
    BACKED_SIZE_OBLIVIOUS = "backed_size_oblivious"


_BY_NAME = PlainSerializer(lambda value: value.name, when_used="json")


ModeField = Annotated[
    CompilationMode,
    parsed_by(CompilationMode.parse),
    _BY_NAME,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": [*CompilationMode.__members__, "VLLM_COMPILE"]},
                {"type": "integer", "minimum": 0, "maximum": 3},
            ]
        }
    ),
]
CUDAGraphModeField = Annotated[
    CUDAGraphMode,
    parsed_by(CUDAGraphMode.parse),
    _BY_NAME,
    WithJsonSchema({"type": "string", "enum": list(CUDAGraphMode.__members__)}),
]

Flag = Annotated[bool, KEY]


class StitchingConfig(FrozenModel):
    """The levers of the stitched function and its entry; each one off is slower, never different."""

    bind_weights: Flag = Field(
        True, description="Bind the weights once instead of fetching and passing them per call."
    )
    direct_splitting_ops: Flag = Field(
        True,
        description="Call a splitting op's own implementation, without the dispatcher, where that is equivalent.",
    )
    direct_artifact_entry: Flag = Field(
        True, description="Call a compiled piece's inner entry instead of its public wrapper."
    )
    check_inputs: Flag = Field(
        True, description="Check each call's inputs against what the trace assumed of them."
    )
    emit_del: Flag = Field(
        True,
        description="Write `del` after the last use of a value, so that memory is freed early.",
    )


class DynamicShapesConfig(FrozenModel):
    """How dynamic dimensions are traced and what is done with the guards on them."""

    if TYPE_CHECKING:  # fields take more than what they hold: a list, a name

        def __init__(self, **fields: Any) -> None: ...

    type: Annotated[DynamicShapesType, KEY] = Field(
        DynamicShapesType.AUTO,
        description="`auto`: every size is served, by one trace where that is known to be right, else by several, made when "
        "a call first needs them; the others make one trace: `backed`: symbols with a hint, sizes 0 and 1 are not served; "
        "`unbacked`: no hint, so nothing can be specialised; `backed_size_oblivious`: a hint, but sizes 0 and 1 are not special.",
    )
    evaluate_guards: Flag = Field(
        False,
        description="Check each call's sizes against Dynamo's shape guards, also where `check_inputs` is off.",
    )
    max_traces: Annotated[int, ignored("each trace is what it is, however many there are")] = Field(
        8,
        ge=1,
        description="How many traces calls may get by themselves under `auto`: the example's, and others for sizes that it "
        "does not serve; what `piecework.compile(sizes=...)` and `capture` ask for does not count.",
    )


class PassConfig(FrozenModel):
    """What a user's passes need of the compilation; the passes themselves are `inductor_passes`."""

    fuse_attn_quant: Flag = Field(
        False,
        description="A user pass fuses attention with what follows, so attention stays in the graph.",
    )
    enable_sp: Flag = Field(
        False,
        description="A user pass cuts the sequence over the tensor-parallel ranks, so captured "
        "sizes are multiples of their number.",
    )
    report_matches: Annotated[bool, ignored("it only adds a report")] = Field(
        False, description="Report how often each pass matched."
    )


@short_methods
class RuntimeConfig(FrozenModel):
    """What the parts read of the program around the model: batch limits, ranks, dtype, name."""

    if TYPE_CHECKING:  # fields take more than what they hold: a list, a name

        def __init__(self, **fields: Any) -> None: ...

    max_num_batched_tokens: Annotated[int, KEY] = Field(
        8192, ge=1, description="The most tokens in one forward; the end of the last range."
    )
    max_num_seqs: Annotated[int, ignored("it only bounds the captured sizes")] = Field(
        256, ge=1, description="The most requests in one forward."
    )
    uniform_decode_query_len: Annotated[int, ignored("it only shapes the captured sizes")] = Field(
        1, ge=1, description="Query tokens of a request in a decode batch (1 plus the speculated)."
    )
    further_decode_query_lens: Annotated[Sizes, ignored("they only shape the captured sizes")] = (
        Field(
            (),
            description="Narrower query lengths that decode batches have too, where the width of the draft varies.",
        )
    )
    enable_lora: Annotated[bool, ignored("it only adds captured descriptors")] = Field(
        False, description="Adapters may be active, so captured graphs are kept apart by it."
    )
    rank: Annotated[int, ignored("each rank has a folder of its own")] = Field(
        0, ge=0, description="This process among the `world_size` of one replica."
    )
    dp_rank: Annotated[int, ignored("each rank has a folder of its own")] = Field(
        0, ge=0, description="This replica's number among the data-parallel ones."
    )
    world_size: Annotated[int, KEY] = Field(
        1, ge=1, description="Processes of one replica: collectives span them."
    )
    tensor_parallel_size: Annotated[int, KEY] = Field(
        1, ge=1, description="Ranks that one layer is cut over."
    )
    data_parallel_size: Annotated[int, ignored("replicas run the same code")] = Field(
        1, ge=1, description="How many replicas run side by side."
    )
    dtype: Annotated[str, KEY] = Field(
        "",
        pattern=r"^([a-z][a-z0-9_]*)?$",
        description="The model's dtype, by torch's name: an error where none of its weights has it. Empty asks nothing of them.",
    )
    model_name: Annotated[str, ignored("only a label; the key has the model's content")] = Field(
        "", description="The model's name in reports and folders."
    )

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Every query length of a decode batch, ascending."""
        return tuple(sorted({self.uniform_decode_query_len, *self.further_decode_query_lens}))

    def conflicts(self) -> Iterator[ConfigProblem]:
        widest, tokens = self.uniform_decode_query_len, self.max_num_batched_tokens
        ranks, replicas, seqs = self.world_size, self.data_parallel_size, self.max_num_seqs
        wider = ", ".join(str(n) for n in self.further_decode_query_lens if n > widest)
        if wider:
            names = "further_decode_query_lens, uniform_decode_query_len"
            yield ConfigProblem(names, f"{wider} is more than {widest}, the widest")
        if widest > tokens:
            names = "uniform_decode_query_len, max_num_batched_tokens"
            yield ConfigProblem(names, f"a request of {widest} tokens does not fit in {tokens}")
        if self.rank >= ranks:
            yield ConfigProblem("rank, world_size", f"rank {self.rank} of {ranks}")
        if self.dp_rank >= replicas:
            names = "dp_rank, data_parallel_size"
            yield ConfigProblem(names, f"replica {self.dp_rank} of {replicas}")
        if ranks % self.tensor_parallel_size:
            why = f"{ranks} ranks are no multiple of {self.tensor_parallel_size}"
            yield ConfigProblem("world_size, tensor_parallel_size", why)
        if seqs > tokens:
            why = f"{seqs} requests of at least one token do not fit in {tokens} tokens"
            yield ConfigProblem("max_num_seqs, max_num_batched_tokens", why)
