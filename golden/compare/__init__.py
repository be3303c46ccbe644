"""What changed between two emitted sources, in meaning. In: their texts. Out: a `SourceDiff`, change by change."""
