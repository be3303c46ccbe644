"""One request behind the splitting op. In: a batch, its KV cache and masks. Out: what each attention layer attends to."""
