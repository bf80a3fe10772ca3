"""Evaluation: generated diagnoses and their accuracy, preferences, likelihoods, texts, drift.

`generate` produces answers. `classification`, `preference` and `text` are pure functions from
answers or log-probs to figures. `likelihood` scores candidate answers without generation. `drift`
follows the diagnosis along the thought. `summary` builds the `evaluation` part of summary.json.
"""
