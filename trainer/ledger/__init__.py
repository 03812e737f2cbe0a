"""The cost ledger (paper, table 7): the measured cost of a clean image under every method."""
