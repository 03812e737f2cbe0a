"""Whether a run fits what is asked of it: samples for every rank, classes in a window of shards, tars in the cache."""

from __future__ import annotations

from ..dataset import ShardDataset
from .plan import classes_in_windows


def too_few(stream: str, samples: int, steps: int, first: int, world: int) -> str:
    """What to do about a stream that cannot give every rank a sample in every batch.

    samples: of this stream. first: of the stream that sets the steps.
    """
    if samples == 0:
        return f"no {stream} samples at all; weaken the attack, or train without them"
    if samples < world:
        return f"only {samples} {stream} samples for {world} processes; start fewer, or weaken the attack"
    enough = -(-first * world // samples)
    mend = f"raise batch to {enough} or more, or weaken the attack"
    return f"only {samples} {stream} samples for {steps} batches an epoch; {mend}"


def poor_in_classes(dataset: ShardDataset, window: int) -> str | None:
    """What to say of batches that hold far fewer classes than shuffled samples would; None where they do not.

    A source sorted by class gives such batches.
    """
    found, expected = classes_in_windows(dataset.shards, dataset.labels, window=window)
    if 2 * found >= expected:
        return None
    enough = 2 * window
    while 2 * classes_in_windows(dataset.shards, dataset.labels, window=enough)[0] < expected:
        enough *= 2
    return (
        f"a window of {window} shards, from which batches are drawn, holds {found:.0f} classes; {expected:.0f} would "
        f"be usual: the source seems sorted by class; raise window to {enough}, or make shards from a shuffled source"
    )


def bytes_at_a_time(dataset: ShardDataset, window: int, orders: int = 1) -> int:
    """Bytes of a stream's tars that workers may read at one time: for each order, three windows of the largest tars.

    A slow worker still reads the first window, others the second, a fast one asks for the third.
    orders: number of streams in whose order the tars are read; partners read clean tars in the DAD stream's order too.
    """
    sizes = sorted((tar.size for tar in dataset.index.tars.values()), reverse=True)
    return sum(sizes[: 3 * window * orders])
