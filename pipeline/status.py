"""State of a run directory at this moment, from any machine: done, running, failed, missing, damaged, speed, ETA."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from manifests import RunDir, RunInfo, UserError
from manifests.claims import SILENT, Claim, Failure, claim_age, look, read_claim, read_failure
from manifests.rows import PartRecord
from manifests.rundir import MANIFEST, PART_NAME, count_statuses


@dataclass(frozen=True, kw_only=True)
class State:
    """One look at a run directory."""

    info: RunInfo
    sealed: bool
    counts: Counter[str]  # samples by status: those of done shards, and those done so far in running ones
    done: frozenset[int]
    missing: list[int]
    damaged: list[str]  # one line each: what is damaged and how
    failed: list[Failure]
    running: list[tuple[Claim, float]]  # claim, and seconds since its last heartbeat

    @property
    def rate(self) -> float:
        """Samples per second of all workers that are running now. Time spent waiting does not count."""
        return sum(claim.rate for claim, silence in self.running if silence <= SILENT)


class Survey:
    """Looks at one run directory again and again, and reads every part file once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        # (shard, size of its part file) -> its record and counts, or why it cannot be read
        self._parts: dict[tuple[int, int], tuple[PartRecord, Counter[str]] | str] = {}
        # shard -> its claim as last seen, and when that was written, on this process's monotonic clock
        self._heartbeats: dict[int, tuple[Claim, float]] = {}

    def look(self, *, tars: bool = False, content: bool = False) -> State:
        """Take one look. tars: check the sizes of all tars; content: also checksums. Raises UserError if no run."""
        info = self._run.info()
        parts = self._read_parts(info)
        damaged = {shard: why for shard, why in parts.items() if isinstance(why, str)}
        if tars:
            sizes = {
                f"{stream}/{name}": size
                for stream in ("clean", "dad")
                for name, size in self._run.store.sizes(stream).items()
            }
            whole = {shard: part[0] for shard, part in parts.items() if not isinstance(part, str)}
            damaged |= {
                shard: why for shard, record in whole.items() if (why := self._tar_damage(record, sizes, content))
            }
        counts: Counter[str] = Counter()
        for shard, part in parts.items():
            if shard not in damaged and not isinstance(part, str):
                counts.update(part[1])
        missing = [shard for shard in range(info.shards) if shard not in parts]
        made_since = set(info.missing or {}) - {str(shard) for shard in missing}
        board = look(self._run.store)
        claimed = sorted(board.running - parts.keys())
        running = [(claim, self._silence(claim)) for shard in claimed if (claim := read_claim(self._run.store, shard))]
        for claim, _ in running:
            counts.update(
                verified=claim.verified, rejected=claim.rejected, error=claim.samples - claim.verified - claim.rejected
            )
        return State(
            info=info,
            sealed=info.counts is not None and not made_since and self._run.store.exists(MANIFEST),
            counts=counts,
            done=frozenset(parts.keys() - damaged.keys()),
            missing=missing,
            damaged=[damaged[shard] for shard in sorted(damaged)],
            failed=[
                failure
                for shard in sorted(board.failed - parts.keys())
                if (failure := read_failure(self._run.store, shard))
            ],
            running=running,
        )

    def _read_parts(self, info: RunInfo) -> dict[int, tuple[PartRecord, Counter[str]] | str]:
        sizes = self._run.store.sizes("manifest")
        numbered = ((PART_NAME.fullmatch(name), size) for name, size in sizes.items())
        found = {(int(match[1]), size) for match, size in numbered if match and int(match[1]) < info.shards}
        with ThreadPoolExecutor(8) as pool:
            new = sorted(found - self._parts.keys())
            read = dict(zip(new, pool.map(lambda shard: self._read_part(shard[0], info.fingerprint), new), strict=True))
        self._parts = {at: part for at, part in (self._parts | read).items() if at in found}
        return {shard: part for (shard, _), part in sorted(self._parts.items())}

    def _read_part(self, shard: int, run: str) -> tuple[PartRecord, Counter[str]] | str:
        try:
            rows, record = self._run.part(shard, run, ("status",))
        except (UserError, FileNotFoundError) as error:
            return str(error)
        return record, Counter(rows.column("status").to_pylist())

    def _tar_damage(self, record: PartRecord, sizes: dict[str, int], content: bool) -> str | None:
        for tar in record.tars:
            if content or sizes.get(tar.name) != tar.size:
                why = self._run.tar_damage(tar, content=content)
                if why:
                    return why
        return None

    def _silence(self, claim: Claim) -> float:
        """Seconds since a worker's last heartbeat: at first by the store's clock, later by this process's own."""
        now = time.monotonic()
        if claim.shard not in self._heartbeats:
            self._heartbeats[claim.shard] = (claim, now - claim_age(self._run.store, claim.shard))
        elif self._heartbeats[claim.shard][0] != claim:
            self._heartbeats[claim.shard] = (claim, now)
        return now - self._heartbeats[claim.shard][1]


def status_lines(out: str, state: State) -> list[str]:
    """Format a state as plain lines for a person."""
    info, counts = state.info, state.counts
    extra = "".join(
        f", {len(found)} {what}" for found, what in ((state.running, "running"), (state.failed, "failed")) if found
    )
    bad = f"{len(state.missing)} missing, {len(state.damaged)} damaged"
    lines = [f"{out}: {len(state.done)} of {info.shards} shards done, {bad}{extra}"]
    lines += [f"  damaged: {why}" for why in state.damaged]
    lines += [
        f"  failed: shard {failure.shard}, {failure.tries} times, last on {failure.host}: {failure.reason}"
        for failure in state.failed
    ]
    lines += [f"  running: {_running(claim, silence)}" for claim, silence in state.running]
    if state.missing:
        lines.append(f"  missing: {_ranges(state.missing)}")
    judged = counts["verified"] + counts["rejected"]
    if judged:
        lines.append(
            f"  samples: {count_statuses(counts)} of {info.samples:,}; verified rate {counts['verified'] / judged:.1%}"
        )
    if state.missing and state.rate:
        left = datetime.timedelta(seconds=round(max(info.samples - counts.total(), 0) / state.rate))
        lines.append(f"  speed: {state.rate:.1f} images/s of the workers that are running; about {left} to go")
    if state.sealed and state.info.missing and not state.damaged:
        without = f"{len(state.info.missing)} shards that could not be made"
        lines.append(f"  sealed without {without} (--allow-missing; run.json says why)")
    elif state.missing or state.damaged:
        running = any(silence <= SILENT for _, silence in state.running)
        lines.append(
            "  at work"
            if running
            else "  nothing is running; run the same `make shards` command again to make what is missing"
        )
    else:
        lines.append("  sealed" if state.sealed else "  all shards are there, not sealed yet: run `make shards` again")
    return lines


def _running(claim: Claim, silence: float) -> str:
    line = f"shard {claim.shard} on {claim.host}, process {claim.pid}: {claim.samples:,} images so far"
    if claim.rate:
        line += f", {claim.rate:.1f} images/s"
    return line if silence <= SILENT else f"{line}; no heartbeat for {datetime.timedelta(seconds=round(silence))}"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
