"""The one reader of people's images, for all uses: class folders, WebDataset tars or Parquet files, local or at a URL.

- `find_source` cuts a source into pieces that become shards, from listings, tar headers and Parquet footers alone;
  `Piece.samples` reads one piece.
- `open_set` opens a labelled set for measuring: `ImageSet.check` reads headers and labels, `pictures` every image.
- `find_layout` tells the layouts apart. A `Place` says where one image lies, for runs that store labels only.

Keys depend on the names in the source, labels on the class list (`classes`); neither on the order of listing.
"""

from .classes import ClassList, classes_for, find_classes, load_classes
from .files import NoSuchFile
from .image_set import ImageSet, Picture, open_set
from .pieces import ImageSource, find_layout, find_source
from .sample import Piece, Place, SourceSample

__all__ = [
    "ClassList",
    "ImageSet",
    "ImageSource",
    "NoSuchFile",
    "Picture",
    "Piece",
    "Place",
    "SourceSample",
    "classes_for",
    "find_classes",
    "find_layout",
    "find_source",
    "load_classes",
    "open_set",
]
