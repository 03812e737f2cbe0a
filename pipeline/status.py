"""What a run directory holds at this moment: done, missing, damaged, how fast, how long yet."""

from __future__ import annotations

import datetime
from collections import Counter

from manifests import RunDir
from manifests.rundir import MANIFEST, count_statuses, part_name


def status_lines(out: str, *, content: bool = False) -> list[str]:
    """Plain lines for a person. Sizes are compared always, checksums only if ``content``. Raises UserError when there is no run."""
    run = RunDir(out)
    info = run.info()
    counts: Counter[str] = Counter()
    times, missing, damaged = [], [], []
    for shard in range(info.shards):
        why = run.damage(shard, info.fingerprint, content=content)
        if why is None:
            table, _ = run.part(shard)
            counts.update(table.column("status").to_pylist())
            times.append((run.store.modified(part_name(shard)), table.num_rows))
        elif run.store.exists(part_name(shard)):
            damaged.append(why)
        else:
            missing.append(shard)
    done = len(times)
    lines = [f"{out}: {done} of {info.shards} shards done, {len(missing)} missing, {len(damaged)} damaged"]
    lines += [f"  damaged: {why}" for why in damaged]
    if missing:
        lines.append(f"  missing: {_ranges(missing)}")
    judged = counts["verified"] + counts["rejected"]
    if judged:
        lines.append(f"  samples: {count_statuses(counts)} of {info.samples:,}; verified rate {counts['verified'] / judged:.1%}")
    if missing and (rate := _rate(times)):
        left = (info.samples - sum(counts.values())) / rate
        lines.append(f"  speed: {rate:.1f} images/s over the finished shards; about {datetime.timedelta(seconds=round(left))} to go")
    if missing or damaged:
        lines.append("  run the same `make shards` command again to make what is missing")
    else:
        sealed = info.counts is not None and run.store.exists(MANIFEST)
        lines.append("  sealed" if sealed else "  all shards are there, not sealed yet: run `make shards` again")
    return lines


def _rate(times: list[tuple[float, int]]) -> float | None:
    """Images per second between the first and the last finished shard."""
    times = sorted(times)
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    return sum(count for _, count in times[1:]) / (times[-1][0] - times[0][0])


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
