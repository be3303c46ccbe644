"""The whole way. In: a decoder that the flat way refuses. Out: its forwards, each kind of call compiled as a whole, its cache among what goes in and comes out."""
