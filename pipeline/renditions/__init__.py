"""The Renditions demo: its images, and how its teacher and discretizer were made."""
