"""How benchmarks measure. In: contenders and settings. Out: times, ratios of one run, tables, files and plots."""
