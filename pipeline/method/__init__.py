"""The paper: attack, teacher, discretizer. The one folder of `pipeline` that `trainer` may import, lazily."""
