"""Where a model keeps its weights and what else a trace read of it, and whether somebody wrote there since. Entry points: `weights.BoundWeights`, `traced_state.TracedState`."""
