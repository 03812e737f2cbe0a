"""Stage 2: shards in, students out.

Training from shards needs nothing of `pipeline`, neither the teacher nor the discretizer; only the online baselines reach for its attack
and models, when they run. For others to use:

- `objectives`: the losses as pure functions (plain, KD, DAD).
- `loop.train`: train a student from a recipe; resumes.
- `online`: the schemes that DAD is compared with (AT, AdvProp, DAT, live teachers), as pure functions; `ledger`: what each costs.
- `export.export`: a student for timm, the Hugging Face hub and ONNX.
- `evaluate`: top-1 with binomial error on image sets.
- `checkpoint.StudentDir`: a trained student on disk.
"""
