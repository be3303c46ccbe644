"""The whole way: a decoder's own forward, its cache's tensors as arguments."""
