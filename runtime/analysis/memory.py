"""What lies in memory. In: writes, each with what is known of the place and of what is written. Out: why a piece of memory can't be trusted any more, if so.

Memory holds rows, or the same for all batches. Rows that are written over rows stay rows; anything else is mixed for all views.
"""

from __future__ import annotations

from dataclasses import dataclass

from piecework.runtime.analysis.state import Rows


@dataclass(slots=True)
class Memory:
    """One piece of memory.

    Attributes:
        rows: whether it was made to hold rows.
        shared: arguments with different ideas of it lie in it.
        mixed: why its contents depend on the padding.
        written: whether anything wrote to it.
    """

    rows: bool
    shared: bool = False
    mixed: str | None = None
    written: bool = False

    def write(self, place: Rows, value: Rows, told: str) -> None:
        """Note that ``value`` was written through a view with the rows ``place``.

        Args:
            told: the operator and its line.
        """
        self.written = True
        reason = place.mixed or value.mixed
        if reason is None and self.shared:
            reason = f"{told} writes to memory of several arguments"
        if reason is None and bool(place.dims) != self.rows:
            into = "of one size" if place.dims else "of rows, to all batches the same"
            reason = f"{told} writes as many rows as the batch has into memory {into}"
        if reason is None and dict(place.dims) != dict(value.dims):
            reason = f"{told} writes rows in another order"
        self.mixed = self.mixed or reason
