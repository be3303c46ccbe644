"""Which sizes of a forward's arguments may differ from the example's."""
