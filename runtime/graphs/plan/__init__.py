"""What will be captured: options, how the graph depends on its batch size, numbers per size, estimates, the capture phase."""
