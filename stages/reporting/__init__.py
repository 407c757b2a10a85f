"""What people read: a table in the terminal, a page in the browser, the card of an exported model.

`results` reads what the stages left, `forms` are the models as they can be served, `measures` compares,
`columns` arranges, `legend` explains. `table`, `page` (with its `sections`) and `card` show it; templates/,
which `templating` fills in, has the markup and the words around it. `plane`, the picture to choose by, and
`charts` are the page's drawings, made with `svg`.
"""
