"""The Renditions demo: its images, and the training of its teacher and discretizer."""
