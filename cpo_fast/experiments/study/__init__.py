"""A test of the paper's claim on the phantom: `python -m cpo_fast.experiments.study`.

Every seed trains one SFT model and, from its checkpoint, three arms with the same studies in the
same order and the same number of pairs: DPO with random negatives, CPO without the thought, and
CPO. `arms` writes their training data, `measure` evaluates every model in the same way, `figures`
builds the paper's tables.
"""
