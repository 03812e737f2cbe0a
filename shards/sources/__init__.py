"""Where the labelled images come from: an ImageFolder, WebDataset tars, or Parquet files, local or behind any fsspec URL.

`plan_source` cuts a source into pieces that become shards, from listings, tar headers and Parquet footers alone; `Piece.samples` reads
one piece. Keys depend on the names in the source, labels on the class list; neither on the order of listing.
"""

from .pieces import SourcePlan, plan_source
from .sample import Piece, SourceSample

__all__ = ["Piece", "SourcePlan", "SourceSample", "plan_source"]
