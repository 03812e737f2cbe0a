"""The cost ledger (paper, table 7): what a clean image costs under every method, measured in turn."""
