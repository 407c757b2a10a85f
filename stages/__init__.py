"""What the pipeline does: one module a DVC stage, each with the same shape.

`run(params, *, ...inputs, out) -> Outcome` does the work and `VERSION` stands for the code. Where a setting
may change without changing the result, `recipe(params)` says which ones do change it; elsewhere dvc.yaml
names the whole section. A stage never imports another stage.
"""
