"""Golden snapshots of emitted source: check, update, review, compare, report.

The modules, in order of use: `cases` (what a case emits), `check` (the four checks), `snapshot` (files), `diff` (what changed),
`show` and `page` (how that looks), `review` (one by one in a terminal), `plugin` (the pytest fixture).
"""
