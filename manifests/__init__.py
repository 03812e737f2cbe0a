"""The record: what was asked for, what exists, what may be trusted.

Works without a GPU and without open_clip, taming or timm. For others to use:

- `RunDir`: a run directory (local or any fsspec URL): ``run.json`` (`RunInfo`), parts, the sealed manifest, damage.
- `Store`: the one place that opens paths and URLs; atomic writes.
- `recipe_dataclass`, `load_recipe`: recipes (YAML to frozen dataclass); an unknown field is refused with the nearest
  name. `Execution` and `Location` mark fields that do not decide the bytes.
- `load_weights`, `find_file`: tensors from files, never code.
- `claims`: who is making which shard, on any machine.
- `files.cache`: the folder for files that can be made or fetched again, and a lock on it.
- `UserError`: a one-line message for the user; `Unwritable` and `Unreachable` are kinds of it. `one_line` shortens a
  library's exception so that it fits into such a message; `command` prints it.
- `devices`, `progress`, `notes`, `signals`: device and number format, progress bars, notes to the user, requests to
  stop; the same in both stages.
"""

from .errors import Unreachable, Unwritable, UserError, one_line
from .files.store import Store
from .files.weights import load_weights
from .recipe import Execution, Location, find_file, load_recipe, recipe_dataclass
from .rundir import RunDir, RunInfo

__all__ = [
    "Execution", "Location", "RunDir", "RunInfo", "Store", "Unreachable", "Unwritable", "UserError", "find_file",
    "load_recipe", "load_weights", "one_line", "recipe_dataclass",
]  # fmt: skip
