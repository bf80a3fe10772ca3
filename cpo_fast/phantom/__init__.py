"""The embedded default data set: drawn radiographs, written reports, known truth; not medicine.

`write_phantom` (or `python -m cpo_fast.phantom --output_dir D --num_studies N`) writes a folder in
the layout of MIMIC-CXR-JPG 2.x, read by the same reader as the real one:

- `files/p10/p10000032/s50414267/<dicom_id>.jpg` and, beside the study's folder, its report
  `s50414267.txt`;
- `mimic-cxr-2.0.0-{chexpert,split,metadata}.csv.gz`, `cxr-record-list.csv.gz`,
  `cxr-study-list.csv.gz`;
- three files that the real one has not: `phantom.json` (the settings), `README.txt` and
  `phantom_truth.jsonl` (per study: what is drawn, where, how strongly, which drifting words are
  used).

What is true of it by construction: about a third of the studies is No Finding, 40 % have two or
more asserted diseases and 18 % three or more, in a long tail; a report's labels are what its
sentences say (1 asserted, 0 denied, -1 hedged, empty not mentioned); every asserted finding is
visible on the frontal picture, no denied or unmentioned one is, and a hedged one is faint in half
of the cases and otherwise not there.

**Drift.** Studies lie within ten years, 2110 to 2119; patients are put into train / validate / test
(80 / 10 / 10 %) in the order of their first visit, so the test split is the latest. Two pairs of
near-synonyms change the finding that they lean to, by L = 0.9 - 0.8 / (1 + exp((7 - t) / 0.3)), t
in years since the first day (at least 0.87 in the first six years, 0.5 at seven, at most 0.13 from
eight on):

- "basilar density" / "basal density" describe, in FINDINGS, an asserted Atelectasis or Pneumonia
  (studies with exactly one of the two; 60 % of them). "basilar density" is used for Atelectasis
  with chance L and for Pneumonia with chance 1 - L, "basal density" the other way round.
- "lung opacity" / "opacity" word an asserted Lung Opacity beside Pneumonia or Edema (exactly one of
  the two; 90 % of them). "lung opacity" is used beside Pneumonia with chance L and beside Edema
  with chance 1 - L.

In 10,000 studies of seed 42 P(Atelectasis | "basilar density") falls from 0.92 in train to 0.15 in
test, P(Pneumonia | "lung opacity") from 0.88 to 0.11. IMPRESSION always names the findings, so the
labels never drift; what a word foretells does.
"""

from __future__ import annotations

from cpo_fast.phantom.dataset import write_phantom

__all__ = ["write_phantom"]
