"""Python files that `torch.compiler.precompile` wrote. In: one or two of them. Out: what is wrong with one, and what changed between two."""
