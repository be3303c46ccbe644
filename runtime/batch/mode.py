"""The modes of static graphs, and which of them each kind of batch runs in."""

import enum
from typing import Self

from piecework.errors import ConfigError


class CUDAGraphMode(enum.Enum):
    """Which static graphs a model uses; the first three are also what one forward can run in.

    The composite modes name a pair: of a uniform decode batch, and of any other (mixed) batch.

    Example:
        >>> CUDAGraphMode.parse("full_and_piecewise").mixed_mode()
        <CUDAGraphMode.PIECEWISE: 1>
    """

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (FULL, NONE)
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    @classmethod
    def parse(cls, value: Self | str | int) -> Self:
        """The mode for ``value``: a mode, a name in any case, or a single mode's number."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        if isinstance(value, int) and not isinstance(value, bool) and value in (0, 1, 2):
            return cls(value)
        why = f"no CUDA graph mode {value!r}"
        hint = "use one of " + ", ".join(cls.__members__)
        raise ConfigError(why, where="cudagraph_mode", hint=hint)

    def separate_routine(self) -> bool:
        """Whether decode batches and mixed batches run in different modes."""
        return isinstance(self.value, tuple)

    def decode_mode(self) -> Self:
        """The mode of a batch in which every request has the same number of query tokens."""
        return CUDAGraphMode(self.value[0]) if self.separate_routine() else self

    def mixed_mode(self) -> Self:
        """The mode of every other batch."""
        return CUDAGraphMode(self.value[1]) if self.separate_routine() else self

    def has_mode(self, mode: Self) -> bool:
        """Whether some batch runs in the single mode ``mode``; of a pair a `ConfigError`."""
        if mode.separate_routine():
            why = f"{mode.name} is a pair of modes, so no batch runs in it"
            hint = "ask for NONE, PIECEWISE or FULL"
            raise ConfigError(why, where="CUDAGraphMode.has_mode", hint=hint)
        return mode in (self.decode_mode(), self.mixed_mode())

    def max_cudagraph_mode(self) -> Self:
        """The most that any batch captures: FULL over PIECEWISE over NONE."""
        return max(self.decode_mode(), self.mixed_mode(), key=lambda mode: mode.value)

    def without_piecewise(self) -> Self:
        """The same mode where the graph is not split: PIECEWISE becomes NONE."""
        pieces_go = {
            CUDAGraphMode.PIECEWISE: CUDAGraphMode.NONE,
            CUDAGraphMode.FULL_AND_PIECEWISE: CUDAGraphMode.FULL_DECODE_ONLY,
        }
        return pieces_go.get(self, self)

    def requires_piecewise_compilation(self) -> bool:
        """Whether the graph must be split for this mode to be possible."""
        return self.has_mode(CUDAGraphMode.PIECEWISE)

    def __str__(self) -> str:
        return self.name
