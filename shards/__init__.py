"""The contract between the stages: what one sample and one tar look like, writing them, streaming them.

Works without a GPU and without open_clip, taming or timm. For others to use:

- `ShardDataset`: one stream of a sealed run, random access to each `LabelledImage`. ``ShardDataset("data/demo", "dad")[0].image``
- `TrainingReader`: planned, resumable batches of clean and DAD samples side by side: a `Batch` holds a `StreamBatch` of each.
- `TarWriter`, `iterate_tar`: deterministic writing of WebDataset tars, with the `Extent` of each sample; distrustful reading, a `Sample`
  at a time.
- `ViewSettings`, `draw_views`, `replay`, `view_images`, `soft_label_members`: several views of an image, each with its own soft label.
- `canvas.load_canvas`: from any image file to square pixels; the same for training and evaluation.
- `ImageFormat`, `encode_image`, `decode_image`: the one codec of both stages; `seeded_generator`: its random numbers, by what they are for.
"""

from .batches import Batch, StreamBatch
from .codec import ImageFormat, decode_image, encode_image
from .dataset import LabelledImage, ShardDataset
from .reader import TrainingReader
from .seeds import seeded_generator
from .tar import Extent, Sample, TarWriter, iterate_tar
from .views import ViewSettings, draw_views, replay, soft_label_members, view_images

__all__ = [
    "Batch",
    "Extent",
    "ImageFormat",
    "LabelledImage",
    "Sample",
    "ShardDataset",
    "StreamBatch",
    "TarWriter",
    "TrainingReader",
    "ViewSettings",
    "decode_image",
    "draw_views",
    "encode_image",
    "iterate_tar",
    "replay",
    "seeded_generator",
    "soft_label_members",
    "view_images",
]  # fmt: skip
