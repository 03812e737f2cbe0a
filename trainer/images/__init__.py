"""Random changes of training images: each image alone (`augmentation`), pairs of a batch (`mixing`)."""
