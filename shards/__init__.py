"""The contract between the stages: the form of one sample and one tar, writing tars, streaming them.

Works without a GPU and without open_clip, taming or timm. Other rooms use:

- `ShardDataset`: one stream of a sealed run with random access: ``ShardDataset("data/demo", "dad")[0]`` is a
  `LabelledImage`.
- `TrainingReader`: planned, resumable batches of several streams side by side. A `Batch` holds one `StreamBatch` per
  stream.
- `TarWriter`: writes WebDataset tars, equal samples to equal bytes, and says the `Extent` of each sample.
- `iterate_tar`: reads any WebDataset tar without trusting it, one `Sample` at a time.
- `ViewSettings`, `draw_views`, `replay`, `view_images`, `soft_label_members`: several views of an image, each with its
  own soft label.
- `canvas.load_canvas`: turns any image file into square pixels; training and evaluation share it.
- `ImageFormat`, `encode_image`, `decode_image`: the codec that both stages share.
- `seeded_generator`: random numbers that depend on their purpose alone.
"""

from .codec import ImageFormat, decode_image, encode_image
from .dataset import LabelledImage, ShardDataset
from .epochs.batches import Batch, StreamBatch
from .epochs.reader import TrainingReader
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
