"""Stage 2: shards in, students out.

Imports nothing of `pipeline`: training from shards needs neither the teacher nor the discretizer. For others to use:

- `objectives`: the losses as pure functions (plain, KD, DAD).
- `loop.train`: train a student from a recipe; resumes.
- `evaluate`: top-1 with binomial error on image sets.
- `checkpoint.StudentDir`: a trained student on disk.
"""
