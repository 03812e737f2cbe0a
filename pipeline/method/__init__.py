"""The paper: attack, teacher, discretizer. `trainer` may import this folder of `pipeline` only, and lazily."""
