"""Speed of stage 1: measuring it, choosing the batch, forecasting a run, the benchmark and the reference it beats."""
