"""What people read: a table in the terminal, a page in the browser, the card of an exported model.

`results` reads what the stages left, `measures` compares, `table` and `page` say it; `sections` and
`examples` are the parts of the page, `charts` its pictures, drawn with `svg`, dressed by
`style`. `card` is the model card, in `markdown`.
"""
