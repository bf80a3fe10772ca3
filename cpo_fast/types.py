"""Data types shared by all stages, in the order of the pipeline from files to a loss.

A stage produces a type and the next stage consumes it; nothing here computes. Sizes in the whole
project: T tokens in a pack, R scored rows, V vocabulary, D hidden size, S segments (scored
sequences), P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import networkx
    import torch

    from cpo_fast.errors import RecordError

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
"""The 14 CheXpert label names, the columns of mimic-cxr-2.0.0-chexpert.csv."""

Labels = Mapping[str, int | None]
"""Finding name -> 1 present, 0 absent, -1 uncertain, None (or missing) not mentioned."""

SPLITS = ("train", "validate", "test")

IMAGE_TOKEN = "<|image_pad|>"
"""Qwen2.5-VL's placeholder for an image in plain text."""

ATTENTIONS = ("auto", "gathered", "sdpa", "varlen", "flex")
"""Attention implementations over a pack (`cpo_fast.model.packed`)."""

OverLong = Literal["drop", "truncate_response", "error"]
OVER_LONG: tuple[OverLong, ...] = get_args(OverLong)
"""Policies for a sample over the maximum length (`cpo_fast.packing.encode`)."""


# --- files -> Study ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Location of an image: `path` relative to `root`, which it cannot leave, or `data`."""

    path: str
    root: str = ""
    data: bytes | None = None


Pixels = Callable[[ImageRef], "tuple[torch.Tensor, torch.Tensor]"]
"""Image -> (pixel values [patches, patch volume] float32, grid [3] int64 (t, h, w) in patches)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Source of a record: a file, and its line (Parquet, Arrow: row) from 1 if the file has several
    records."""

    file: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The two sections of a radiology report used for training; one of them can be empty."""

    findings: str = ""
    impression: str = ""

    @property
    def text(self) -> str:
        """`FINDINGS: ...\\n\\nIMPRESSION: ...` with the original text, without empty sections."""
        parts = (("FINDINGS", self.findings), ("IMPRESSION", self.impression))
        return "\n\n".join(f"{name}: {text}" for name, text in parts if text)


@dataclass(frozen=True, slots=True)
class Study:
    """One examination: frontal images, report, labels; `date` is YYYYMMDD, ordered per patient."""

    study_id: str
    patient_id: str
    report: Report
    images: tuple[ImageRef, ...] = ()
    labels: Labels = field(default_factory=dict)
    split: str = "train"  # one of SPLITS
    date: str = ""
    indication: str = ""
    origin: Origin | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """A record set aside: one line of rejected_records.jsonl, without patient text.

    `stage` is empty for a record that no stage uses. "counterfactual" is a counterfactual that
    failed its checks; another stage ("sft", "cpo", "evaluate") omitted its sample of a record that
    other stages use.
    """

    file: str
    line: int | None
    id: str
    reason: str  # a short constant such as "no-findings-or-impression", counted in summary.json
    detail: str = ""
    stage: str = ""

    @classmethod
    def of(
        cls, id: str, origin: Origin | None, error: RecordError, *, file: str = "", stage: str = ""
    ) -> RejectedRecord:
        """The record `id` that failed with `error`; `file` is its source without an `origin`."""
        place = origin or Origin(file)
        return cls(place.file, place.line, id, error.reason, error.detail, stage)

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        if not self.stage:
            del row["stage"]
        return row


# --- concepts ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attribute:
    """An imaging feature of the concept graph, e.g. D4 "air bronchograms" of category "density"."""

    id: str
    category: str  # "morphological" | "density" | "anatomical" | "functional_dynamic"
    name: str
    phrases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Disease:
    """A disease of the concept graph with attribute ids; `associations` include the hallmarks."""

    name: str
    hallmarks: tuple[str, ...]
    associations: tuple[str, ...]
    exclusions: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ConceptGraph:
    """Diseases and attributes related by association, exclusion or (neither) irrelevance.

    `network` is the graph in networkx (nodes have `kind`, edges `relation`); `contradictions` are
    pairs of incompatible attribute ids; `excluded` maps a disease to the diseases it rules out.
    """

    attributes: Mapping[str, Attribute]
    diseases: Mapping[str, Disease]
    contradictions: frozenset[frozenset[str]]
    excluded: Mapping[str, frozenset[str]]
    network: networkx.Graph


# --- counterfactual ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """A report rewritten for another disease; one line of counterfactuals.jsonl."""

    id: str  # "study/target"
    study_id: str
    patient_id: str
    images: tuple[str, ...]
    report: str
    labels: tuple[str, ...]
    target: str
    counterfactual: str
    counterfactual_labels: tuple[str, ...]
    kind: str = "thinking"  # "thinking" | "perception"
    generator: str = "graph"
    seed: int = 42
    checks: Mapping[str, bool] = field(default_factory=dict)
    rejected_images: tuple[str, ...] = ()  # shown for the rejected answer of a perception pair

    @property
    def passed(self) -> bool:
        return all(self.checks.values())

    def to_json(self) -> dict[str, Any]:
        row = asdict(replace(self, checks=dict(self.checks)))
        if not self.rejected_images:
            del row["rejected_images"]
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Counterfactual:
        """Inverse of `to_json`; raises KeyError for a missing field that has no default."""
        fields = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        for name in ("images", "labels", "counterfactual_labels"):
            fields[name] = tuple(row[name])
        fields["rejected_images"] = tuple(row.get("rejected_images") or ())
        return cls(**fields)


Answer = str | tuple[Mapping[str, Any], ...]
"""One assistant answer, or several messages {"role", "content"}."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Text of one chosen answer against K rejected ones (K = 0 for SFT): one preference row.

    An answer is the next assistant message or, as a tuple, the messages after the prompt, tool and
    user messages included: all of them are scored, as in trl.

    `prompt` is a list of messages {"role", "content"} without the answer; each of `images` is a
    part {"type": "image"} of a content list. `rejected_images[k]`, if not None, replaces the images
    for the k-th rejected answer (a perception counterfactual), and `rejected_prompts[k]` its
    prompt. `plain`: the prompt is one text that the answers continue without a chat template, as in
    trl's string rows. `template` has the other arguments of the chat template (`tools` and the
    row's `chat_template_kwargs`). `sighted`: a row without images in a file with an images column;
    trl tokenises it differently. `patients`: the patient ids of the row, if known.
    """

    id: str
    prompt: tuple[Mapping[str, Any], ...]
    chosen: Answer
    rejected: tuple[Answer, ...] = ()
    images: tuple[ImageRef, ...] = ()
    rejected_images: tuple[tuple[ImageRef, ...] | None, ...] = ()
    source: str = "thinking"
    weight: float = 1.0
    rejected_prompts: tuple[tuple[Mapping[str, Any], ...] | None, ...] = ()
    plain: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    sighted: bool = False
    patients: tuple[str, ...] = ()
    origin: Origin | None = field(default=None, compare=False)

    @property
    def all_images(self) -> tuple[ImageRef, ...]:
        """The images of all answers, first of the chosen one."""
        return (*self.images, *(image for own in self.rejected_images for image in own or ()))

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of each rejected answer: perception if it has other images."""
        replaced = self.rejected_images or (None,) * len(self.rejected)
        return tuple(
            self.source if images is None or images == self.images else "perception"
            for images in replaced
        )


# --- packing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, image placeholders already expanded to one id per visual token."""

    input_ids: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """A tokenised `Preference`: one prompt, its chosen response and K rejected ones.

    `rejected_prompts[k]` is None if the k-th rejected response follows the shared prompt (always
    for thinking counterfactuals; the tuple can then be empty). `ref_logps` is empty unless cached.
    """

    id: str
    prompt: Prompt
    chosen: tuple[int, ...]
    rejected: tuple[tuple[int, ...], ...] = ()
    rejected_prompts: tuple[Prompt | None, ...] = ()
    source: str = "thinking"
    weight: float = 1.0
    ref_logps: tuple[float, ...] = ()  # cached log-probs of the reference: chosen, then rejected
    origin: Origin | None = field(default=None, compare=False)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt, then the separate prompts of rejected responses."""
        return (self.prompt, *(own for own in self.rejected_prompts if own is not None))

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of each rejected response: perception if its prompt has other images."""
        prompts = self.rejected_prompts or (None,) * len(self.rejected)
        return tuple(
            self.source if own is None or own.images == self.prompt.images else "perception"
            for own in prompts
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several groups in one row: [prompt | chosen | rejected_1 .. rejected_K | prompt | ...].

    A token attends causally to its own study's prompt and its own branch. `study_index` numbers
    prompts (a perception pair has two), `branch_index` is 0 on prompts and numbers the branches of
    a study from 1. Row r of the scored hidden states is `hidden[score_rows[r]]` and predicts
    `labels[r]`; the first token of every branch is predicted by the last state of its prompt.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [3, T] int64, mRoPE (temporal, height, width)
    study_index: torch.Tensor  # [T] int64
    branch_index: torch.Tensor  # [T] int64
    score_rows: torch.Tensor  # [R] int64 into T
    labels: torch.Tensor  # [R] int64
    segment_ids: torch.Tensor  # [R] int64 into S
    pairs: torch.Tensor  # [P, 2] int64 (chosen segment, rejected segment); P = 0 for SFT
    pair_weights: torch.Tensor  # [P] float32
    pair_sources: tuple[str, ...]  # P names, "thinking" or "perception"
    segment_names: tuple[str, ...]  # S names, "group id/chosen" or "group id/rejected_k"
    num_segments: int
    logical_tokens: int  # without sharing: prompt + chosen and prompt + rejected of every pair
    pixel_values: torch.Tensor | None = None  # [patches, patch volume] of all images, in order
    image_grid_thw: torch.Tensor | None = None  # [images, 3] int64
    image_order: tuple[int, ...] | None = None  # image indices in row order, if some repeat
    ref_logps: torch.Tensor | None = None  # [S] float32 if all groups have them cached

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return self._map_tensors(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map_tensors(lambda x: x.pin_memory())

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        tensors: dict[str, Any] = {
            name: change(value)
            for name in self.__dataclass_fields__
            if hasattr(value := getattr(self, name), "device")
        }
        return replace(self, **tensors)
