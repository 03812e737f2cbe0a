"""The recipes that come with the project: one YAML file each, whose header says command, hardware, hours and the numbers to expect."""

from pathlib import Path

FOLDER = Path(__file__).parent
DEMO = "demo"
