"""Which heads to scale, and by how much: published methods and this package's own, under one roof.

`methods` is the table of all methods; each has a file of its own, which maps a `Subject` (a model with examples) to
`Scored` heads. `select_heads` chooses the heads and a strength, `compare_heads` measures several methods side by side,
and `circuit_metrics` judges any scores as MIB's circuit track does.
"""
