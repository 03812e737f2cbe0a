"""The project's recipes, one YAML file each. Its header gives the command, hardware, hours and numbers to expect."""

from pathlib import Path

FOLDER = Path(__file__).parent
DEMO = "demo"
