"""What the models can do: generated diagnoses, their accuracy, preferences, likelihoods, texts.

`generate` makes the model speak, `classification` / `preference` / `text` are pure functions from
answers to figures, `likelihood` scores candidate answers without generating, `drift` watches the
diagnosis move along the thought, and `summary` puts it together for summary.json and the report.
"""
