"""Stage 2's small run, for the tests of signals, which stop a training."""

from __future__ import annotations

from ..trainer.conftest import tiny_run  # noqa: F401  # a fixture
