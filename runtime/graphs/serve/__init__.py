"""A captured model at work: what is captured of it, which graph serves a call, what it says."""
