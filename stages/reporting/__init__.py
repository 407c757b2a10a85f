"""What people read: a table in the terminal, a page in the browser, the card of an exported model.

`results` reads what the stages left, `measures` compares. `table`, `page` (with its `sections`) and `card`
choose what to show; templates/, which `templating` fills in, has the words and the markup. `charts` are the
page's drawings, made with `svg`.
"""
