"""From a model to one graph, by Dynamo: `tracing.attempts` says what is tried, `one_trace.trace_once` tries it."""
