"""What a trace read of the model and the process, and whether that is still so."""
