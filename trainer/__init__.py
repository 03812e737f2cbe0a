"""Stage 2: shards in, students out.

Training from shards needs nothing of `pipeline`. Only methods that attack, or that ask the teacher or the discretizer
in training, import its `method` folder, when they run. For others to use:

- `recipe.load`: a recipe (`Recipe`) from a file or name, with overrides.
- `loop.train`: a recipe in, a student's directory out; resumes. `loop.Hooks` watches a run on the way.
- `methods`: the training methods, one file each. `METHODS` is the registry; `methods.method` says what a method is.
- `checkpoint.StudentDir`: a student on disk. `load_student` gives its model, from [0, 1] images to logits.
- `export.export`: a student as a folder for timm and the Hugging Face hub, and as ONNX.
- `evaluation`: scores of students on image sets.
- `tables`: results of many students as Markdown and as a picture; the list of methods.
- `study.demo_table`: several methods and seeds, trained and reported in one table.
- `ledger`: the cost of a clean image under every method. Run it with ``python -m trainer.ledger.cost``.
- `images`: augmentation, Mixup and CutMix.
- `ranks.distributed`: one student trained by many processes.
"""
