"""Random changes of training images: of single images (`augmentation`), of pairs (`mixing`)."""
