"""What a traced graph does to the rows of its batch. Entry points: `rows.rows_of` (padding), `unbacked.admits_unbacked` (symbolic batch sizes)."""
