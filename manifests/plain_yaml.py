"""YAML as people write it: mappings, lists and values. What could fill the memory from a small file is refused."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 16 << 20  # bytes; a class list of 100,000 names takes a few


class _Plain(yaml.SafeLoader):
    """A loader without aliases, of which a few lines can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def load_plain(text: str) -> Any:
    """Load one YAML document. Raises yaml.YAMLError, also for aliases, endless nesting, or more than `LARGEST`."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text):,} characters; at most {LARGEST:,} are read")
    try:
        return yaml.load(text, _Plain)  # a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    except ValueError as error:  # such as a date that is none
        raise yaml.YAMLError(str(error)) from error
