"""Speed of stage 1: measurements, the batch size, the forecast of a run, the benchmark, the official loop."""
