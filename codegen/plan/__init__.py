"""The plan of emitted text: its classes, its checks, and how it becomes text in black's format."""
