"""B8 to B11. In: the cases of a captured model on a GPU. Out: their times, one row each, saved as it ends."""
