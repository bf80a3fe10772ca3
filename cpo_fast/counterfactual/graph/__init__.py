"""The rewriter: edits a report along the concept graph, without a language model.

`rewrite` is the entry point: it splits a section into sentences (`text`), edits each (`edit`) and
inserts a sentence about the target (`wording`). `edit` cuts a sentence into clauses (`clauses`,
`scope`, `exemption`), edits denials (`denial`) and normal statements (`normal`) and corrects the
grammar (`grammar`). `lexicon` holds the patterns of each target, compiled from the concept graph.
"""
