"""From a model to one graph, by Dynamo. In: a callable and example arguments. Out: a `Capture`: the graph, where its inputs come from, what the trace assumed. Entry point: `tracing.capture`."""
