"""The emitted entry at work (`entry.Entry`): what a call uses, why it is refused, edited source."""
