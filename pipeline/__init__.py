"""Stage 1: labelled images in, shards of verified discrete adversarial images out.

For others to use (`trainer` imports from `method` only, lazily):

- `method`: the paper. `attack` is one pure function; `teacher` holds open_clip's zero-shot and timm's classifiers;
  `discretizer` holds the VQGAN.
- `generate.make_shards`: a recipe in, a sealed run directory out; resumes.
- `job.shard.run_shard`: the per-shard job that any engine can run.
- `job.worker.work_through`: the loop that every launcher runs; `launchers`: local processes, a Slurm array, Ray actors.
- `speed`: measuring, the batch size, the forecast of a run, the benchmark.
- `status.Survey`: what a run directory holds at this moment, from any machine.
"""
