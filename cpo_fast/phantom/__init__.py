"""The built-in data set: synthetic radiographs and reports with ground truth; not medical data.

`write_phantom` (or `python -m cpo_fast.phantom --output_dir D --num_studies N`) writes a folder in
the layout of MIMIC-CXR-JPG 2.x, which the reader of the real data set reads:

- `files/p10/p10000032/s50414267/<dicom_id>.jpg` and, next to the study's folder, its report
  `s50414267.txt`;
- `mimic-cxr-2.0.0-{chexpert,split,metadata}.csv.gz`, `cxr-record-list.csv.gz`,
  `cxr-study-list.csv.gz`;
- three additional files: `phantom.json` (the settings), `README.txt` and `phantom_truth.jsonl` (per
  study: the signs with place and strength, the drifting words).

By construction, about a third of the studies are No Finding, 40 % have two or more asserted
diseases and 18 % three or more, with a long tail. The labels of a report follow from its sentences
(1 asserted, 0 denied, -1 hedged, empty not mentioned). Every asserted finding is visible on the
frontal image, no denied or unmentioned finding is, and a hedged one is faint in half of the cases
and otherwise absent.

**Drift.** Studies span ten years, 2110 to 2119. Patients are assigned to train / validate / test
(80 / 10 / 10 %) in the order of their first visit, so the test split is the latest. Two pairs of
near-synonyms swap their associated findings with L = 0.9 - 0.8 / (1 + exp((7 - t) / 0.3)), t in
years since the first day (at least 0.87 in the first six years, 0.5 at seven, at most 0.13 from
eight on):

- "basilar density" / "basal density" describe, in FINDINGS, an asserted Atelectasis or Pneumonia
  (studies with exactly one of the two; 60 % of them). "basilar density" is used for Atelectasis
  with probability L and for Pneumonia with probability 1 - L, "basal density" vice versa.
- "lung opacity" / "opacity" describe an asserted Lung Opacity together with Pneumonia or Edema
  (exactly one of the two; 90 % of them). "lung opacity" is used with Pneumonia with probability L
  and with Edema with probability 1 - L.

In 10,000 studies with seed 42, P(Atelectasis | "basilar density") falls from 0.92 in train to 0.15
in test, P(Pneumonia | "lung opacity") from 0.88 to 0.11. IMPRESSION always names the findings, so
the labels do not drift; the meaning of the words does.
"""

from __future__ import annotations

from cpo_fast.phantom.dataset import write_phantom

__all__ = ["write_phantom"]
