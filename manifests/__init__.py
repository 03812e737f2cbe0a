"""The record: what was asked for, what exists, what may be trusted.

Works without a GPU and without open_clip, taming or timm. For others to use:

- `RunDir`: a run directory (local or any fsspec URL): ``run.json`` (`RunInfo`), parts and the sealed manifest; finds damage.
- `Store`: the one place that opens paths and URLs; atomic writes.
- `recipe_dataclass`, `load_recipe`: recipes (YAML to frozen dataclass) with refusals that name the nearest field; `Execution` and
  `Location` mark fields that do not decide the bytes.
- `load_weights`, `find_file`: tensors from files, never code.
- `claims`: who is making which shard, on any machine.
- `cache`: the folder of what can be made or fetched again, and a lock on it.
- `UserError`: a one-line message for the user, of which `Unwritable` and `Unreachable` are kinds; `one_line`: what a library's exception
  says, to stand within one; `command`: how command lines print it.
- `devices`, `progress`: where a model computes, and bars with rate and ETA, the same in both stages.
"""

from .errors import Unreachable, Unwritable, UserError, one_line
from .files.store import Store
from .files.weights import load_weights
from .recipe import Execution, Location, find_file, load_recipe, recipe_dataclass
from .rundir import RunDir, RunInfo

__all__ = [
    "Execution", "Location", "RunDir", "RunInfo", "Store", "Unreachable", "Unwritable", "UserError", "find_file", "load_recipe",
    "load_weights", "one_line", "recipe_dataclass",
]  # fmt: skip
