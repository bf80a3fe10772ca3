"""Sentences that assert a target disease, with its hallmarks, in the style of radiograph reports.

Slots: {place} a region as noun ("right lower lobe"), {zone} the same as adjective ("right
basilar"), {side} "right" or "left", {size} a size or degree. Sentences are for one side or both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a finding: `sides` of the body, the region as noun and as adjective."""

    sides: frozenset[str]
    place: str
    zone: str

    @property
    def side(self) -> str:
        return "bilateral" if len(self.sides) == 2 else next(iter(self.sides))


@dataclass(frozen=True, slots=True)
class TargetWording:
    """Sentences for the findings and phrases for the impression, for one side and for both."""

    places: tuple[Place, ...]
    one: tuple[str, ...]
    both: tuple[str, ...] = ()
    impression_one: tuple[str, ...] = ()
    impression_both: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("",)


_RIGHT, _LEFT, _BOTH = frozenset({"right"}), frozenset({"left"}), frozenset({"right", "left"})
_LOBES = (
    Place(_RIGHT, "right upper lobe", "right upper lobe"),
    Place(_RIGHT, "right middle lobe", "right middle lobe"),
    Place(_RIGHT, "right lower lobe", "right lower lobe"),
    Place(_LEFT, "left upper lobe", "left upper lobe"),
    Place(_LEFT, "left lower lobe", "left lower lobe"),
)
_BASES = (
    Place(_RIGHT, "right lung base", "right basilar"),
    Place(_LEFT, "left lung base", "left basilar"),
    Place(_BOTH, "lung bases", "bibasilar"),
)
_SIDES = (
    Place(_RIGHT, "right hemithorax", "right"),
    Place(_LEFT, "left hemithorax", "left"),
)
_CENTRAL = (Place(_BOTH, "both lungs", "bilateral"),)
_SMALL = ("small", "moderate")
_DEGREE = ("mild", "moderate")

TARGET_WORDINGS: dict[str, TargetWording] = {
    "Atelectasis": TargetWording(
        places=_BASES,
        one=(
            "There is linear {zone} atelectasis with mild volume loss.",
            "Bandlike density at the {place} is compatible with subsegmental atelectasis.",
            "There is platelike atelectasis at the {place}.",
            "Streaky {zone} density is present with volume loss, consistent with atelectasis.",
            "Subsegmental atelectasis is seen at the {place}.",
            "There is {zone} atelectasis with crowding of the bronchovascular markings.",
        ),
        both=(
            "There is linear bibasilar atelectasis with mild volume loss.",
            "Bandlike densities at the lung bases are compatible with subsegmental atelectasis.",
            "There is platelike atelectasis at both lung bases.",
            "Streaky bibasilar densities are present with volume loss, consistent with "
            "atelectasis.",
            "Subsegmental atelectasis is seen at both lung bases.",
            "There is bibasilar atelectasis with crowding of the bronchovascular markings.",
        ),
        impression_one=(
            "{Zone} atelectasis.",
            "Subsegmental atelectasis at the {place}.",
            "Linear {zone} atelectasis.",
        ),
        impression_both=(
            "Bibasilar atelectasis.",
            "Subsegmental atelectasis at both lung bases.",
            "Linear bibasilar atelectasis.",
        ),
    ),
    "Cardiomegaly": TargetWording(
        places=_CENTRAL,
        one=(),
        both=(
            "The heart is {size} enlarged.",
            "The cardiac silhouette is {size} enlarged.",
            "There is {degree} cardiomegaly.",
            "{Degree} enlargement of the cardiac silhouette.",
            "{Degree} cardiomegaly is present.",
            "There is {degree} enlargement of the heart.",
        ),
        impression_both=("{Degree} cardiomegaly.", "Cardiomegaly.", "Enlarged cardiac silhouette."),
        sizes=("mildly", "moderately"),
    ),
    "Consolidation": TargetWording(
        places=_LOBES,
        one=(
            "There is {place} consolidation with air bronchograms.",
            "Dense consolidation is present in the {place}.",
            "There is homogeneous airspace consolidation in the {place}.",
            "{Place} consolidation is seen with air bronchograms.",
            "Focal airspace consolidation is noted in the {place}.",
            "There is dense {place} airspace consolidation.",
        ),
        impression_one=(
            "{Place} consolidation.",
            "Airspace consolidation in the {place}.",
            "Focal {place} consolidation.",
        ),
    ),
    "Edema": TargetWording(
        places=_CENTRAL,
        one=(),
        both=(
            "There is {degree} pulmonary edema with Kerley B lines.",
            "Pulmonary vascular congestion is present with {degree} interstitial edema.",
            "There are septal lines and vascular congestion, consistent with {degree} "
            "interstitial edema.",
            "The pulmonary vasculature is engorged with {degree} interstitial edema.",
            "{Degree} interstitial pulmonary edema is present with peribronchial cuffing.",
            "There is perihilar vascular congestion with {degree} pulmonary edema.",
        ),
        impression_both=(
            "{Degree} pulmonary edema.",
            "{Degree} interstitial edema with vascular congestion.",
            "Pulmonary edema.",
        ),
        sizes=_DEGREE,
    ),
    "Emphysema": TargetWording(
        places=_CENTRAL,
        one=(),
        both=(
            "The lungs are hyperinflated with flattened hemidiaphragms, consistent with emphysema.",
            "Hyperinflation and hyperlucency of the lungs are consistent with emphysema.",
            "There is {degree} emphysema with hyperexpanded lungs.",
            "Emphysematous changes are present with increased retrosternal airspace.",
            "The lungs are hyperexpanded and hyperlucent, consistent with {degree} emphysema.",
            "{Degree} emphysematous changes are seen with hyperinflation.",
        ),
        impression_both=(
            "Emphysema.",
            "{Degree} emphysema.",
            "Hyperinflation consistent with emphysema.",
            "Emphysematous changes.",
        ),
        sizes=_DEGREE,
    ),
    "Enlarged Cardiomediastinum": TargetWording(
        places=_CENTRAL,
        one=(),
        both=(
            "The mediastinum is {size} widened.",
            "There is {degree} widening of the mediastinum.",
            "{Degree} mediastinal widening is present.",
            "The mediastinal contour is {size} widened.",
            "The superior mediastinum is {size} widened.",
            "There is {degree} widening of the superior mediastinum.",
        ),
        impression_both=(
            "{Degree} mediastinal widening.",
            "Widened mediastinum.",
            "{Degree} widening of the mediastinum.",
        ),
        sizes=("mildly", "moderately"),
    ),
    "Lung Lesion": TargetWording(
        places=_LOBES,
        one=(
            "There is a {size} mm nodule in the {place}.",
            "A {size} mm well-circumscribed nodule is present in the {place}.",
            "A rounded {size} mm nodule projects over the {place}.",
            "There is a {size} mm {place} pulmonary nodule.",
            "A {size} mm rounded nodular density is seen in the {place}.",
            "{Place} nodule measures {size} mm.",
        ),
        impression_one=(
            "{Place} pulmonary nodule.",
            "{size} mm {place} nodule.",
            "{size} mm nodule in the {place}.",
        ),
        sizes=("9", "10", "12", "14", "15", "16", "17"),
    ),
    "Lung Opacity": TargetWording(
        places=_LOBES,
        one=(
            "There is a patchy opacity in the {place}.",
            "Patchy airspace opacity is present in the {place}.",
            "There is ill-defined {place} opacity.",
            "A hazy opacity is seen in the {place}.",
            "{Place} airspace opacity is noted.",
            "Heterogeneous opacity is present in the {place}.",
        ),
        impression_one=(
            "{Place} opacity.",
            "Patchy {place} opacity.",
            "Airspace opacity in the {place}.",
        ),
    ),
    "Pleural Effusion": TargetWording(
        places=(*_SIDES, Place(_BOTH, "pleural spaces", "bilateral")),
        one=(
            "There is a {size} {side} pleural effusion.",
            "A {size} {side} pleural effusion is present with blunting of the costophrenic angle.",
            "{Size} {side} pleural effusion with a meniscus at the costophrenic angle.",
            "{Size} {side} pleural effusion is seen.",
            "There is a {size} layering {side} pleural effusion.",
            "Blunting of the {side} costophrenic angle is consistent with a {size} pleural "
            "effusion.",
        ),
        both=(
            "There are {size} bilateral pleural effusions.",
            "{Size} bilateral pleural effusions are present with blunting of the costophrenic "
            "angles.",
            "{Size} bilateral pleural effusions are seen.",
            "Blunting of both costophrenic angles is consistent with {size} pleural effusions.",
        ),
        impression_one=(
            "{Size} {side} pleural effusion.",
            "{Side} pleural effusion.",
        ),
        impression_both=("{Size} bilateral pleural effusions.", "Bilateral pleural effusions."),
        sizes=_SMALL,
    ),
    "Pleural Other": TargetWording(
        places=_SIDES,
        one=(
            "There is {side} apical pleural thickening.",
            "{Side} pleural thickening is present.",
            "There is pleural thickening along the {side} lateral chest wall.",
            "{Degree} {side} pleural thickening is noted.",
            "Pleural thickening with a calcified plaque is present on the {side}.",
            "There is {degree} smooth {side} pleural thickening.",
        ),
        impression_one=(
            "{Side} pleural thickening.",
            "Chronic {side} pleural thickening.",
        ),
        sizes=_DEGREE,
    ),
    "Pneumonia": TargetWording(
        places=_LOBES,
        one=(
            "There is patchy {place} airspace opacity consistent with pneumonia.",
            "Airspace opacity with air bronchograms in the {place} is consistent with pneumonia.",
            "There is {place} pneumonia with patchy airspace opacity.",
            "Patchy infiltrate is present in the {place}, compatible with pneumonia.",
            "{Place} infiltrate is consistent with pneumonia.",
            "There is focal {place} airspace disease representing pneumonia.",
        ),
        impression_one=(
            "{Place} pneumonia.",
            "Findings consistent with {place} pneumonia.",
            "{Place} airspace disease consistent with pneumonia.",
        ),
    ),
    "Pneumothorax": TargetWording(
        places=_SIDES,
        one=(
            "There is a {size} {side} apical pneumothorax.",
            "A {size} {side} pneumothorax is present with a visible visceral pleural line.",
            "{Size} {side} apical pneumothorax with absent peripheral lung markings.",
            "There is a {size} {side} pneumothorax.",
            "A visceral pleural line is seen at the {side} apex, consistent with a {size} "
            "pneumothorax.",
            "A {size} {side} pneumothorax is seen.",
        ),
        impression_one=(
            "{Size} {side} pneumothorax.",
            "{Side} pneumothorax.",
            "{Size} {side} apical pneumothorax.",
        ),
        sizes=_SMALL,
    ),
}

_DEGREES = {"mildly": "mild", "moderately": "moderate"}


def fill_template(template: str, place: Place, size: str) -> str:
    """Fill the slots of `template`; a capitalised slot starts a sentence."""
    degree = _DEGREES.get(size, size)
    values = {"place": place.place, "zone": place.zone, "side": place.side, "size": size}
    values["degree"] = degree
    values |= {name.capitalize(): text[:1].upper() + text[1:] for name, text in values.items()}
    return template.format(**values)
