"""The paper's claim put to the test on the phantom: `python -m cpo_fast.experiments.study`.

For every seed one SFT model is trained, and from its checkpoint three arms with the same studies in
the same order and the same number of pairs: DPO with random negatives, CPO without the thought, and
CPO. `arms` writes what each arm learns from, `measure` asks every model the same, `figures` lays
the results out as the paper does.
"""
