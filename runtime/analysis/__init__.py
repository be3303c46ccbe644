"""What a traced graph does to its memory. Entry points: `unbacked.EverySize` (one compiled form for every size), `writes`."""
