"""What methods are made of: losses, attacks on the student, sets of batch norms, and the frozen models of a run."""
