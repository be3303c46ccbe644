"""One request behind the splitting op: what each attention layer attends to."""
