"""Exact epochs: planned from the manifest (`plan`), read in batches (`reader`), whatever the workers and ranks."""
