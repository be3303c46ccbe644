"""From a model to one graph, by Dynamo: `sizes.attempts`, then `one_trace.trace_once` of each."""
