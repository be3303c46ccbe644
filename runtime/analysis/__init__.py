"""What a traced graph does to its memory, to its state and to the rows of its batch. Entry points: `rows.verdict.rows_of` (padding), `unbacked.admits_unbacked` (symbolic batch sizes), `writes`."""
