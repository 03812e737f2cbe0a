"""The work of one shard, and who does it: models on a device, batches, shards, workers, the gallery."""
