"""Stage 1: labelled images in, shards of verified discrete adversarial images out.

For others to use (`trainer` reaches, lazily, for the method modules only):

- `attack`: the method as one pure function, `teacher`: open_clip zero-shot and timm classifiers, `discretizer`: the VQGAN.
- `generate.make_shards`: a recipe in, a sealed run directory out; resumes.
- `shard_job.run_shard`: the per-shard job that any engine can run.
- `worker.work_through`: what every launcher runs; `launchers`: local processes, a Slurm array, Ray actors.
- `status.Survey`: what a run directory holds at this moment, from any machine.
"""
