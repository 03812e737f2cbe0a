"""Training methods: one file each, as pure functions of logits and images."""
