"""The work of one shard: models on a device, batches, the shard itself, the worker that makes it, the gallery."""
