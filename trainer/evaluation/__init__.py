"""Scoring a student on image sets: what is read (`sets`), how it is counted (`score`), what is kept (`kept`)."""
