"""Phrases of the phantom's reports, short enough for a small model to learn.

Placeholders: {side} right / left, {place} a lobe or zone, {size} and {degree} from the strength of
the sign. A finding has phrases for one side and, if it can be bilateral, for both; findings without
a side have `one` only. Words that CheXpert assigns to another finding ("opacity", "infiltrate",
"scar") occur only in phrases for that finding.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FindingPhrases:
    """Phrases that assert or hedge a finding in FINDINGS and name it in IMPRESSION."""

    one: tuple[str, ...]
    hedged: tuple[str, ...]
    name: tuple[str, ...]
    both: tuple[str, ...] = ()
    hedged_both: tuple[str, ...] = ()
    name_both: tuple[str, ...] = ()


FINDING_PHRASES: dict[str, FindingPhrases] = {
    "Cardiomegaly": FindingPhrases(
        one=(
            "The heart is {degree} enlarged.",
            "There is {degree} cardiomegaly.",
            "The cardiac silhouette is {degree} enlarged.",
            "{degree} enlargement of the heart is present.",
        ),
        hedged=(
            "The heart may be mildly enlarged.",
            "Possible mild cardiomegaly.",
            "The cardiac silhouette may be mildly enlarged.",
        ),
        name=("cardiomegaly", "{degree} cardiomegaly", "enlarged heart"),
    ),
    "Enlarged Cardiomediastinum": FindingPhrases(
        one=(
            "The upper mediastinum is widened.",
            "There is widening of the mediastinal contour.",
            "The mediastinum is {degree} widened.",
        ),
        hedged=(
            "The mediastinum may be widened.",
            "Possible widening of the upper mediastinum.",
        ),
        name=("widened mediastinum", "mediastinal widening"),
    ),
    "Edema": FindingPhrases(
        one=(
            "There is {degree} pulmonary edema with Kerley lines.",
            "Perihilar congestion and septal lines indicate {degree} interstitial edema.",
            "Pulmonary vascular congestion with {degree} edema is seen.",
            "Batwing perihilar congestion is due to {degree} pulmonary edema.",
        ),
        hedged=(
            "Possible mild interstitial edema.",
            "Perihilar changes may represent mild pulmonary edema.",
            "Mild pulmonary edema cannot be excluded.",
        ),
        name=("{degree} pulmonary edema", "pulmonary edema", "interstitial edema"),
    ),
    "Consolidation": FindingPhrases(
        one=(
            "There is dense consolidation of the {side} {place} with air bronchograms.",
            "The {side} {place} is consolidated, with air bronchograms.",
            "Homogeneous {side} {place} consolidation ends at the fissure.",
            "A {side} {place} consolidation is present.",
        ),
        hedged=(
            "Possible {side} {place} consolidation.",
            "Early consolidation of the {side} {place} cannot be excluded.",
        ),
        name=("{side} {place} consolidation", "consolidation in the {side} {place}"),
    ),
    "Pneumonia": FindingPhrases(
        one=(
            "Patchy changes in the {side} {place} are consistent with pneumonia.",
            "There is patchy {side} {place} pneumonia.",
            "Patchy heterogeneous pneumonia is seen in the {side} {place}.",
            "The {side} {place} shows bronchopneumonia.",
        ),
        both=(
            "There is multifocal pneumonia in both lower lobes.",
            "Patchy bilateral lower lobe pneumonia is seen.",
            "Multifocal patchy changes in both lungs are consistent with pneumonia.",
        ),
        hedged=(
            "Patchy changes in the {side} {place} may represent pneumonia.",
            "Early {side} {place} pneumonia cannot be excluded.",
            "Possible pneumonia in the {side} {place}.",
        ),
        hedged_both=(
            "Patchy changes in both lower lobes may represent pneumonia.",
            "Possible multifocal pneumonia.",
        ),
        name=("{side} {place} pneumonia", "pneumonia in the {side} {place}", "pneumonia"),
        name_both=("multifocal pneumonia", "bilateral pneumonia"),
    ),
    "Lung Opacity": FindingPhrases(
        one=(
            "Hazy airspace opacities are present in the {side} {place}.",
            "An ill-defined infiltrate is seen in the {side} {place}.",
            "There are ground-glass opacities in the {side} {place}.",
        ),
        both=(
            "Hazy airspace opacities are present in both lungs.",
            "Ill-defined infiltrates are seen in both lungs.",
        ),
        hedged=(
            "Possible hazy opacities in the {side} {place}.",
            "A faint {side} infiltrate cannot be excluded.",
        ),
        hedged_both=("Possible hazy opacities in both lungs.",),
        name=("{side} {place} opacities", "hazy {side} infiltrate"),
        name_both=("bilateral opacities", "bilateral infiltrates"),
    ),
    "Atelectasis": FindingPhrases(
        one=(
            "There is linear atelectasis at the {side} base.",
            "Platelike {side} basilar atelectasis raises the hemidiaphragm.",
            "Bandlike {side} atelectasis with volume loss is seen.",
            "There is subsegmental {side} basal atelectasis.",
        ),
        both=(
            "There is linear bibasilar atelectasis.",
            "Platelike atelectasis with volume loss is seen at both bases.",
            "Bandlike bibasilar atelectasis is present.",
        ),
        hedged=(
            "Possible {side} basilar atelectasis.",
            "Linear changes at the {side} base may represent atelectasis.",
        ),
        hedged_both=("Possible bibasilar atelectasis.",),
        name=("{side} basilar atelectasis", "{side} atelectasis"),
        name_both=("bibasilar atelectasis", "bilateral atelectasis"),
    ),
    "Lung Lesion": FindingPhrases(
        one=(
            "There is a rounded nodule in the {side} {place}.",
            "A well-circumscribed {side} {place} mass is seen.",
            "A {side} {place} nodule with lobulated margins is present.",
        ),
        hedged=(
            "Possible nodule in the {side} {place}.",
            "A small {side} {place} nodule cannot be excluded.",
        ),
        name=("{side} {place} nodule", "{side} {place} mass"),
    ),
    "Emphysema": FindingPhrases(
        one=(
            "The lungs are hyperinflated with flattened diaphragms.",
            "Hyperinflation and hyperlucency reflect emphysema.",
        ),
        hedged=("Possible emphysema.",),
        name=("emphysema",),
    ),
    "Pleural Effusion": FindingPhrases(
        one=(
            "There is a {size} {side} pleural effusion.",
            "A {size} {side} pleural effusion blunts the costophrenic angle.",
            "A {size} {side} effusion forms a meniscus.",
            "Layering {side} pleural fluid is {size}.",
        ),
        both=(
            "There are {size} bilateral pleural effusions.",
            "Both costophrenic angles are blunted by {size} effusions.",
            "Layering bilateral pleural effusions are {size}.",
        ),
        hedged=(
            "Possible small {side} pleural effusion.",
            "A small {side} effusion cannot be excluded.",
            "The {side} costophrenic angle may hold a small effusion.",
        ),
        hedged_both=(
            "Possible small bilateral pleural effusions.",
            "Small bilateral effusions cannot be excluded.",
        ),
        name=("{size} {side} pleural effusion", "{side} pleural effusion", "{side} effusion"),
        name_both=("bilateral pleural effusions", "{size} bilateral effusions"),
    ),
    "Pneumothorax": FindingPhrases(
        one=(
            "There is a {size} {side} apical pneumothorax.",
            "A {side} visceral pleural line marks a {size} pneumothorax.",
            "A {size} {side} pneumothorax without lung markings is seen.",
        ),
        hedged=(
            "A tiny {side} pneumothorax cannot be excluded.",
            "Possible small {side} apical pneumothorax.",
        ),
        name=("{size} {side} pneumothorax", "{side} pneumothorax"),
    ),
    "Pleural Other": FindingPhrases(
        one=(
            "There is {side} apical pleural thickening.",
            "Pleural thickening caps the {side} apex.",
        ),
        both=(
            "There is biapical pleural thickening.",
            "Pleural thickening caps both apices.",
        ),
        hedged=(
            "Possible {side} apical pleural thickening.",
            "The {side} apical pleura may show pleural thickening.",
        ),
        hedged_both=("Possible biapical pleural thickening.",),
        name=("{side} pleural thickening", "{side} apical pleural thickening"),
        name_both=("biapical pleural thickening",),
    ),
    "Fracture": FindingPhrases(
        one=(
            "There is a displaced fracture of a {side} lateral rib.",
            "A {side} rib fracture with a cortical step is seen.",
        ),
        hedged=(
            "Possible {side} rib fracture.",
            "A {side} rib fracture cannot be excluded.",
        ),
        name=("{side} rib fracture", "displaced {side} rib fracture"),
    ),
}

DEVICES: dict[str, tuple[str, ...]] = {
    "pacemaker": (
        "A left pacemaker is in place with its lead in the right ventricle.",
        "The left chest wall pacemaker lead ends in the right ventricle.",
    ),
    "endotracheal tube": (
        "The endotracheal tube ends above the carina and the nasogastric tube in the stomach.",
        "Endotracheal and nasogastric tubes are in standard position.",
    ),
    "central line": (
        "A right internal jugular central venous catheter ends in the superior vena cava.",
        "The tip of the right central venous catheter is in the superior vena cava.",
    ),
    "chest tube": (
        "A {side} chest tube is in place.",
        "The {side} chest tube ends at the apex.",
    ),
}

# Drifting sentences (see the package docstring): they only describe; IMPRESSION names the disease.
DENSITY = ("There is a {side} {word}.", "A {side} {word} is seen.")
DENSITY_BOTH = ("There is a {word} on both sides.", "A {word} is seen bilaterally.")
OPACITY = ("{word} is seen in the {side} {place}.", "{word} is present in the {side} {place}.")
OPACITY_BOTH = ("{word} is seen on both sides.", "{word} is present bilaterally.")

# Finding -> (term in a denial, relative frequency).
DENIED: dict[str, tuple[str, float]] = {
    "Pleural Effusion": ("pleural effusion", 1.0),
    "Pneumothorax": ("pneumothorax", 1.0),
    "Consolidation": ("focal consolidation", 1.0),
    "Edema": ("pulmonary edema", 0.8),
    "Pneumonia": ("pneumonia", 0.4),
    "Fracture": ("displaced rib fracture", 0.3),
}

HEART_NORMAL = ("The heart size is normal.", "The heart is normal in size.")
MEDIASTINUM_NORMAL = (
    "The mediastinal contours are normal.",
    "The mediastinal contours are unremarkable.",
)
HEART_AND_MEDIASTINUM_NORMAL = (
    "Heart size and mediastinal contours are normal.",
    "The heart and mediastinal contours are within normal limits.",
)
LUNGS_CLEAR = (
    "The lungs are clear and well expanded.",
    "Both lungs are well aerated and clear.",
    "The lungs are clear without abnormal markings.",
)
# Normal statement -> findings that must be absent for it to be true. CheXpert labels none of them.
ALSO_NORMAL: dict[str, frozenset[str]] = {
    "The osseous structures are intact.": frozenset({"Fracture"}),
    "The visualized bones show no acute abnormality.": frozenset({"Fracture"}),
    "The trachea is midline.": frozenset({"Enlarged Cardiomediastinum"}),
    "The hilar structures are of normal size.": frozenset({"Edema", "Enlarged Cardiomediastinum"}),
    "The pulmonary vasculature is normal.": frozenset({"Edema", "Emphysema"}),
    "The costophrenic angles are sharp on both sides.": frozenset({"Pleural Effusion"}),
    "The hemidiaphragms are smooth and well defined.": frozenset(
        {"Atelectasis", "Pleural Effusion", "Emphysema"}
    ),
    "The apices are clear.": frozenset({"Pneumothorax", "Pleural Other", "Lung Lesion"}),
    "The upper abdomen is unremarkable.": frozenset(),
    "The soft tissues of the chest wall are unremarkable.": frozenset(),
}
NOTHING = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No evidence of acute cardiopulmonary disease.",
)

INDICATIONS = (
    "shortness of breath",
    "cough",
    "fever",
    "chest pain",
    "hypoxia",
    "preoperative evaluation",
    "weakness",
    "follow-up examination",
    "fall",
    "tachypnea",
)
