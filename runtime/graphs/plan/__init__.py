"""What will be captured: options, the batch shape, refusals, estimates, the capture phase."""
