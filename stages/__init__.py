"""What the pipeline does: one module a DVC stage, each with the same shape.

`recipe(params)` says which settings change the result, `VERSION` stands for the code, and
`run(params, *, ...inputs, out) -> Outcome` does the work. A stage never imports another stage.
"""
