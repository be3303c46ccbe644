"""The emitted entry at work: what a call uses, why it is refused, edited source, failures with their place in the model. Entry point: `entry.Entry`."""
