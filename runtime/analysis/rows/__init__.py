"""Which operators keep the rows of a batch apart: a table of rules, and the walk over a graph that asks it. Entry point: `verdict.rows_of`."""
