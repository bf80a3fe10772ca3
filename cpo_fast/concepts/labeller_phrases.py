"""Phrases and rules of the finding labeller: regular expressions over lower-case sentences.

They are independent of the generator's tables (graph.json, counterfactual/graph/wording.py), so
that the labeller detects faults of the generator. The method (mentions, then cues of negation and
doubt in the same clause) follows the CheXpert labeller of Irvin et al. 2019 (arXiv 1901.07031,
appendix B). The expressions are our own, tuned on the odd-numbered reports of Open-I.
"""

from __future__ import annotations

_SIDE = r"(?:right|left|bilateral|both)"

MENTIONS: dict[str, tuple[str, ...]] = {
    "Atelectasis": (
        r"atelecta\w+",
        r"collapsed? (?:of the )?(?:\w+ ){0,3}(?:lobe|lung)",
        r"(?:lobe|lobar|lung|lingular|segmental) collapse",
        r"(?:lobes?|lungs?|lingula)(?:,[^,;.]{1,40},)?(?: (?:is|are|was|were|has|have|been|"
        r"remains?|appears?|not|no|longer|now|again|also|\w+ly))+ collapsed",
    ),
    "Cardiomegaly": (
        r"cardiomegaly",
        r"cardiac (?:\w+ )?enlargement",
        r"enlarged? (?:\w+ ){0,2}(?:heart|cardiac)",
        r"enlargement of (?:the )?(?:heart|cardiac|cardiopericardial)",
        r"(?:heart|cardiac silhouette|cardiac shadow|cardiac size|cardiopericardial silhouette|"
        r"cardiac contours?|cardiomediastinal silhouette|heart silhouette|"
        r"cardiac and mediastinal silhouettes?)"
        r"(?: size| shadow| silhouette| contour)?(?:(?! and| with|,|;| normal| pulmonary).){0,35}?"
        r"\b(?:enlarge[dment]*|large|big)\b",
        r"large heart",
        r"increase in heart size",
    ),
    "Consolidation": (r"(?<!non)(?<!non-)consolidat\w+",),
    "Edema": (
        r"(?:pulmonary |interstitial |alveolar |vascular |lung |"
        r"airspace )?(?<!soft tissue )(?:o?edema)(?! of the (?:soft|arm|neck))",
        r"(?:vascular|venous|pulmonary|hilar|interstitial|central|perihilar) congesti\w+",
        r"congesti(?:on|ve)\b",
        r"vascular(?:ity)? (?:\w+ ){0,3}(?:engorge\w+|prominen\w+|congest\w+|redistribution|"
        r"enlarged?)",
        r"(?:engorge\w+|prominen\w+|congest\w+|redistribution|cephalization|"
        r"enlarged?) (?:of )?(?:the )?"
        r"(?:\w+ ){0,3}(?:pulmonary |central )?(?:vascula\w+|vessels)",
        r"cephaliz\w+",
        r"kerley",
        r"heart failure",
        r"\bchf\b",
        r"fluid overload",
        r"volume overload",
        r"vascular engorgement",
        r"engorged",
        r"(?:vascula\w+|vessels) (?:is|are|appears?|remains?) (?:\w+ )?congested",
    ),
    "Emphysema": (
        r"(?<!subcutaneous )(?<!mediastinal )(?<!tissue )(?<!wall )emphysema\w*",
        r"bullous (?:lung )?disease",
    ),
    "Enlarged Cardiomediastinum": (
        r"(?:widen(?:ed|ing)|enlarge[dment]*|prominen(?:t|"
        r"ce)) (?:of )?(?:the )?(?:\w+ ){0,2}(?:cardio ?)?mediastin\w+",
        r"mediastin(?:um|al)(?! (?:is |are )?(?:normal|unremarkable|"
        r"stable))(?: (?!not\b)\w+){0,4}? (?:widen(?:ed|ing)|"
        r"enlarge[dment]*|prominen(?:t|ce)|wide|fullness)",
        r"cardiomediastinal silhouette (?:(?!not\b)\w+ ){0,4}enlarged",
    ),
    "Fracture": (
        r"(?<!catheter )(?<!lead )(?<!wire )fractur\w*",
        r"compression deformit\w+",
        r"rib deformit\w+",
    ),
    "Lung Lesion": (
        r"nodul(?:e|es|ar|arity)\b(?! (?:goiter|thyroid))",
        r"\bmass(?:es)?\b(?! effect)",
        r"lung lesions?",
        r"pulmonary lesions?",
        r"(?<!osseous )(?<!bony )(?<!bone )(?<!destructive )\blesions?\b",
        r"metasta\w+",
        r"neoplas\w+",
        r"carcinoma",
        r"\btumou?r",
        r"malignan\w+",
        r"cavit\w+",
    ),
    "Lung Opacity": (
        r"opaci\w+",
        r"opacif\w+",
        r"air[ -]?space (?:\w+ )?(?:disease|process|change)s?",
        r"alveolar (?:disease|process)",
        r"infiltrat\w+",
        r"airspace (?:consolidation|filling)",
        r"hazy|haziness",
    ),
    "Pleural Effusion": (
        r"(?<!pericardial )(?<!joint )effusions?",
        r"pleural fluid",
        r"fluid (?:\w+ ){0,3}(?:pleural|fissure)",
        r"(?:hydro|hemo|haemo|pyo)(?:pneumo)?thora\w+",
        r"empyema",
        r"fissural fluid",
    ),
    "Pleural Other": (
        r"pleural (?:\w+ ){0,3}(?:thicken\w+|plaques?|scar\w*|calcification\w*|fibrosis|reaction|"
        r"tag|rind|abnormalit\w+)",
        r"(?:thickened|calcified|scarred) (?:\w+ )?pleura\w*",
        r"thickening of (?:the )?(?:\w+ ){0,3}pleura\w*",
        r"pleur(?:o|al)[- ]?parenchymal (?:\w+ ){0,2}(?:scar\w*|thicken\w+|disease|change\w*)",
        r"fibrothorax",
        r"apical (?:cap|thickening)\w*",
        r"apical capping",
    ),
    "Pneumonia": (
        r"(?<!history of )(?:broncho)?pneumonias?",
        r"\bpneumonitis",
        r"pneumonic",
        r"\bpna\b",
    ),
    "Pneumothorax": (r"(?:hydro|ha?emo)?pneumo ?thora\w+", r"\bptx\b"),
    "Support Devices": (
        r"catheter\w*",
        r"(?<!pleural )\blines?\b(?= (?:tip|terminat|in place|is|with|overl|project))",
        r"(?:central venous|picc|subclavian|jugular|midline|dialysis) (?:venous )?(?:line|"
        r"catheter)",
        r"picc",
        r"pacemaker|pacer\b|pacing|\baicd\b|\bicd\b|defibrillator|generator",
        r"(?:endotracheal|enteric|nasogastric|orogastric|feeding|tracheostomy|chest|ng|et|"
        r"drainage|gastrostomy|"
        r"dobhoff|thoracostomy|shunt|pleural) tub\w+",
        r"tracheostomy",
        r"port-?a-?cath\w*|mediport|chest port|\bport\b",
        r"sternotomy|sternal wires?|cabg|bypass|valve (?:replacement|prosthe\w+)|"
        r"prosthetic (?:\w+ )?valve",
        r"surgical (?:clips?|hardware)|(?:fixation|fusion|orthopedic|spinal) (?:hardware|rods?|"
        r"device)",
        r"\bstents?\b|\bhardware\b|stimulator|\bleads?\b|electrodes?|prosthes[ie]s|arthroplasty",
        r"\bdevice\b|\btubing\b|swan|\bfilter\b",
    ),
}
"""Finding -> expressions; each match is a mention."""

STEMS: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("atelecta", "collaps"),
    "Cardiomegaly": ("heart", "cardi"),
    "Consolidation": ("consolidat",),
    "Edema": (
        *("edema", "congest", "vascula", "vessels", "cephaliz", "kerley", "heart failure", "chf"),
        *("overload", "engorge"),
    ),
    "Emphysema": ("emphysema", "bullous"),
    "Enlarged Cardiomediastinum": ("mediastin",),
    "Fracture": ("fractur", "deformit"),
    "Lung Lesion": (
        *("nodul", "mass", "lesion", "metasta", "neoplas", "carcinoma", "tumo", "malignan"),
        "cavit",
    ),
    "Lung Opacity": ("opaci", "air", "alveolar", "infiltrat", "haz"),
    "Pleural Effusion": ("effusion", "fluid", "thora", "empyema"),
    "Pleural Other": ("pleur", "fibrothorax", "apical "),
    "Pneumonia": ("pneumon", "pna"),
    "Pneumothorax": ("thora", "ptx"),
}
"""Finding -> substrings, one of which every mention contains: a fast test before matching."""

_CALLED_NORMAL = (
    r"(?:(?! not | but | with | and the |enlarged|large\b|widened|borderline|upper (?:limits|"
    r"normal)|top[ -]normal|cannot)[^;.]){0,60}?"
    r"(?<!not )(?<!of )\b(?:normal(?! for)|unremarkable|within (?:the )?(?:\w+ )?(?:normal limits|"
    r"limits of normal)|of normal size|not (?:\w+ )?(?:enlarged|widened))\b"
)
CALLED_NORMAL: tuple[tuple[str, str], ...] = (
    (
        "Atelectasis",
        r"\b(?:lungs?|lobes?|lingula)(?: (?:has|have|is|are|now|again|fully|completely|since))+ "
        r"re-? ?(?:expanded|inflated|aerated)\b",
    ),
    (
        "Cardiomegaly",
        r"\b(?:heart|cardiac|cardiomediastinal|cardiopericardial)\b" + _CALLED_NORMAL,
    ),
    (
        "Cardiomegaly",
        r"\b(?:normal|unremarkable)(?: \w+)?(?: size| sized)? (?:heart|cardiac|cardiomediastinal)",
    ),
    ("Enlarged Cardiomediastinum", r"\b(?:cardio)?mediastin(?:um|al)\b" + _CALLED_NORMAL),
    (
        "Enlarged Cardiomediastinum",
        r"\b(?:normal|unremarkable) (?:heart size and |cardiac and )?(?:cardio)?mediastin",
    ),
)
"""(finding, expression): a normal statement about an organ denies the finding implicitly."""

# --- findings ruled out by normal statements: for checks of counterfactuals, not for labels -------

_FINE = (
    r"\b(?:normal|within (?:the )?(?:\w+ )?(?:normal limits|limits of normal)|unremarkable|"
    r"not (?:\w+ )?enlarged|normal-sized)\b"
)
_OF_ELSE = (
    r"air ?space|consolid|infiltr|\bbon[ey]|osse|skelet|fracture|displaced|spin[ea]|abdom|"
    r"\bribs?\b|cervical|thorax are"
)
_ACUTE = ("Consolidation", "Edema", "Pneumonia", "Pneumothorax", "Pleural Effusion")
_AIRSPACE = ("Atelectasis", "Consolidation", "Edema", "Lung Lesion", "Lung Opacity", "Pneumonia")

NORMALITY: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"\blungs?(?: fields?| parenchyma)?(?:(?!otherwise)[^,;.]){0,40}?\bclear\b(?! (?:of|from))",
        _AIRSPACE,
    ),
    (r"\b(?:well[- ](?:expanded|inflated) and )?clear lungs\b", _AIRSPACE),
    (r"\bthey are (?:grossly )?clear\b", _AIRSPACE),
    (
        r"\blungs\b(?:(?! of |volume)[^,;.]){0,45}?\b(?:unremarkable|normal|no acute \w+)\b(?!ly)",
        _AIRSPACE,
    ),
    (r"\blung volumes?\b[^,;.]{0,30}" + _FINE, ("Emphysema",)),
    (
        r"\blungs? (?:are |is |appear )?(?:\w+ )?normally (?:inflated|expanded|aerated)",
        ("Emphysema",),
    ),
    (
        r"\bheart(?: size| silhouette| shadow| contours?)?(?:(?!enlarged|,| with)[^;.]){0,60}?"
        + _FINE,
        ("Cardiomegaly",),
    ),
    (
        r"\bnormal (?:in )?(?:heart|cardiac|size heart|sized heart|cardiomediastinal|cardio)\b",
        ("Cardiomegaly",),
    ),
    (
        r"\b(?:cardiac|cardio ?mediastinal)(?: and mediastinal)? (?:silhouettes?|contours?|size|"
        r"shadow|structures)"
        r"(?:(?!enlarged| with)[^;.]){0,60}?" + _FINE,
        ("Cardiomegaly",),
    ),
    (
        r"\b(?:cardio ?)?mediastin(?:um|al)(?: (?:silhouettes?|contours?|structures|width))?"
        r"(?:(?!enlarged|widened| with)[^;.]){0,50}?" + _FINE,
        ("Enlarged Cardiomediastinum",),
    ),
    (r"\bnormal (?:heart size and )?(?:cardio ?)?mediastin", ("Enlarged Cardiomediastinum",)),
    (
        r"\bvascul(?:arity|ature|ar (?:pattern|markings|engorgement))(?:(?!congest|"
        r"prominent)[^;.]){0,50}?" + _FINE,
        ("Edema",),
    ),
    (r"\bnormal (?:pulmonary )?vascul", ("Edema",)),
    (
        r"\bcostophrenic (?:angles?|sulci|recesses)(?:[^,;.]){0,30}?\b(?:clear|sharp|normal)\b",
        ("Pleural Effusion",),
    ),
    (
        r"\b(?:pleural spaces?|pleura)(?:[^,;.]){0,30}?"
        r"\b(?:clear|sharp|normal|unremarkable|no acute \w+)\b",
        ("Pleural Effusion", "Pneumothorax"),
    ),
    (
        r"^normal chest(?! wall)|chest (?:x-?ray |x-xxxx |radiograph |film )?is normal|"
        r"negative chest|"
        r"^normal (?:exam|study)|^(?:normal|negative)\W*$|"
        r"^(?:(?:stable|there is an?) )?(?:normal|negative|unremarkable) (?:\w+ )?"
        r"(?:radiographs?|films?|x-\w+|chest(?! wall))\b",
        (),
    ),
    (
        rf"^(?:(?!{_OF_ELSE})[^;])*?\b(?:no|negative for|"
        rf"without)\b(?:(?!{_OF_ELSE})[^.;,]){{0,60}}?\b(?:acute|active)\b"
        rf"(?:(?!{_OF_ELSE})[^.;]){{0,60}}?\b(?:abnormalit\w+|disease|process\w*|findings?|"
        rf"patholog\w+|changes?)\b",
        _ACUTE,
    ),
)
"""(expression, findings that the statement rules out); an empty tuple: every finding."""

EXEMPTION = r"\b(?:otherwise|besides|except|apart from|aside from|other than|remainder|remaining)\b"
"""A normal statement with one of these rules nothing out."""

ONE_SIDE = r"\b(?:(right|left) (?:lung|hemithorax)\b[^.;,]*\bclear\b|clear (right|left) lung\b)"
"""A statement that one lung only is clear."""

OPPOSED: tuple[tuple[str, str], ...] = (
    (
        "Emphysema",
        r"low(?:er)? lung volumes?|lung volumes (?:are|remain) (?:\w+ )?(?:low|small|decreased)|"
        r"hypo(?:inflat|ventilat|aerat|expan)\w+|volume loss|bronchovascular crowding|"
        r"elevat\w+ (?:of )?(?:the )?(?:right |left )?(?:hemi)?diaphragm|shallow inspirat\w+",
    ),
    (
        "Atelectasis",
        r"hyper(?:inflat|expan|aerat|lucen)\w+|air trapping|"
        r"flatten\w* (?:of )?(?:the )?(?:hemi)?diaphragm\w*",
    ),
    ("Edema", r"(?:attenuated|decreased|diminished|reduced) (?:pulmonary )?(?:vascul\w+|vessels)"),
)
"""(finding, incompatible assertion): the anatomy behind the exclusions of the graph."""
