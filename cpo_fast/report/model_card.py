"""The model card, README.md of a model folder, from the run's own files.

It has figures and settings only: no text of a report, no id of a study, no local path. Nothing is
uploaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.folders import read_object, write_private
from cpo_fast.model.lineage import CONFIG
from cpo_fast.report.describe import (
    data_kind,
    describe_preference,
    describe_reference,
    has_reports,
    records_by_stage,
    stage_title,
)
from cpo_fast.report.evaluation_tables import BEST, evaluation_tables
from cpo_fast.report.headline import describe_protocol
from cpo_fast.report.read import Run, counts, is_number, objects, read_run
from cpo_fast.report.run_tables import speed_table
from cpo_fast.report.tables import (
    Cell,
    Row,
    Table,
    format_number,
    format_seconds,
    name_of,
    number_cell,
    table_markdown,
)
from cpo_fast.training.stage_settings import TRAINING_STAGES

PAPERS = {
    "cpo": "[arXiv 2505.13081](https://arxiv.org/abs/2505.13081)",
    "perception": "[arXiv 2604.15705](https://arxiv.org/abs/2604.15705)",
}
SHARED = (
    "seed", "max_length", "truncation", "max_pixels", "max_images", "lora_r", "lora_alpha",
    "lora_dropout", "lora_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs",
    "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "bf16",
)  # fmt: skip
"""Settings of both stages. Each stage also has the settings that exist with the prefix `sft_`."""
OF_CPO = (
    "loss_type", "beta", "label_smoothing", "rpo_alpha", "counterfactual_sources",
    "thinking_weight", "perception_weight", "normalize_source_weights", "num_targets",
    "rejected_answer", "expand_pairs",
)  # fmt: skip
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def write_cards(run_dir: Path) -> list[Path]:
    """Write README.md (mode 0600) into every model folder that summary.json of the run names, and
    into the folder of the merged SFT model. Returns the files."""
    run = read_run(run_dir)
    written = []
    for stage in TRAINING_STAGES:
        named = run.part("stages", stage).get("checkpoint")
        checkpoint = run_dir / stage / Path(named).name if isinstance(named, str) else None
        for folder in (checkpoint, run_dir / stage / "merged"):
            if folder is not None and folder.is_dir():
                written.append(write_card(folder, run, stage))
    return written


def card_of_export(checkpoint: Path, folder: Path) -> Path | None:
    """Write the card of a whole model merged from `checkpoint` into `folder`.

    None if `checkpoint` is not in the folder of a finished run (run/stage/checkpoint-N).
    """
    stage, run_dir = checkpoint.resolve().parent.name, checkpoint.resolve().parents[1]
    if stage not in TRAINING_STAGES or not (run_dir / "summary.json").is_file():
        return None
    return write_card(folder, read_run(run_dir), stage, merged=checkpoint.resolve().name)


def write_card(folder: Path, run: Run, stage: str, *, merged: str = "") -> Path:
    path = folder / "README.md"
    write_private(path, model_card(folder, run, stage, merged=merged))
    return path


def model_card(folder: Path, run: Run, stage: str, *, merged: str = "") -> str:
    """Markdown with the hub's YAML header, for the model of `stage` in `folder`.

    `merged` is the adapter's checkpoint if the model was merged from it after the run.
    """
    adapter = (folder / CONFIG).is_file()
    takes_images = (folder / "preprocessor_config.json").is_file()
    base = hub_name(run.config)
    name = f"{base.split('/')[-1] if base else _describe_start(run.config)}, {stage.upper()}"
    title = stage_title(run, stage)
    version = f" {run.part('versions').get('cpo_fast', '')}".rstrip()
    evaluation = run.part("evaluation")
    tables = evaluation_tables(evaluation)
    parts = [
        _header(run, stage, base, adapter=adapter, takes_images=takes_images),
        f"# {name}",
        f"{'A LoRA adapter' if adapter else 'A model'} from {title[0].lower()}{title[1:]} with "
        f"cpo_fast{version}, on {_describe_data(run, stage)}",
        _describe_method(run, stage),
        *_describe_merge(run, stage, merged, evaluated=bool(tables)),
        _describe_limits(run, stage, evaluated=bool(tables)),
        "## Use",
        _usage_code(base or _base_of_adapter(folder), adapter=adapter, takes_images=takes_images),
        "## Data",
        *table_markdown(_data_table(run, stage)),
        "## Hyper-parameters",
        *table_markdown(_settings_table(run.config, stage, adapter)),
        "## Training",
        *table_markdown(_training_table(run, stage)),
    ]
    if tables:
        parts += ["## Evaluation", _describe_evaluation(evaluation)]
        for table in tables:
            parts += [f"### {table.caption}", *table_markdown(table)]
    return "\n\n".join(parts) + "\n"


def _describe_merge(run: Run, stage: str, merged: str, *, evaluated: bool) -> list[str]:
    """For a model merged after the run: its checkpoint, and the one of the card's figures."""
    if not merged:
        return []
    named = run.part("stages", stage).get("checkpoint")
    result = Path(named).name if isinstance(named, str) else ""
    figures = "training figures and the evaluation" if evaluated else "training figures"
    text = f"It is the adapter `{merged}` of the run, merged into its base model."
    if result and result != merged:
        return [f"{text} The {figures} below are from `{result}`, not from this checkpoint."]
    return [f"{text} The evaluation below was made before the merge." if evaluated else text]


def _describe_limits(run: Run, stage: str, *, evaluated: bool) -> str:
    how = "It was not evaluated."
    if any(stage in objects(part) for part in run.part("evaluation").values()):
        how = "It was evaluated only as shown below."
    elif evaluated:
        how = "It was not evaluated; the evaluation below is of another model of the run."
    drawn = ""
    if data_kind(run) == "phantom":
        drawn = " A program drew the radiographs of the phantom."
    return f"**Not a medical device.** {how} Do not use it for diagnosis.{drawn}"


def _describe_evaluation(evaluation: Mapping[str, Any]) -> str:
    models = objects(evaluation.get("classification"))
    sentences = []
    if models:
        studies, split = evaluation.get("studies", "?"), evaluation.get("split", "?")
        number_of_studies = counted(studies, "study", "studies")
        sentences.append(f"{number_of_studies} of the {split} split; all models of the run.")
    sentences += [describe_protocol(evaluation)] if describe_protocol(evaluation) else []
    sentences.append("The 95 % bootstrap interval is in brackets after a figure.")
    sentences += [BEST] if len(models) > 1 else []
    return " ".join(sentences)


def hub_name(config: Mapping[str, Any]) -> str | None:
    """The hub's name of the starting model if its path is in a hub's cache or is org/name."""
    path = _starting_model(config)
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)(?:/|$)", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return path if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) else None


def _describe_start(config: Mapping[str, Any]) -> str:
    name = Path(_starting_model(config) or "model").name
    if config.get("sft_checkpoint"):
        return f"The SFT checkpoint {name}"
    return "A tiny random model" if name == "tiny" else name


def _starting_model(config: Mapping[str, Any]) -> str:
    """The model that the run started from; an SFT checkpoint replaces the base model."""
    return str(config.get("sft_checkpoint") or config.get("model_name_or_path") or "")


def _header(run: Run, stage: str, base: str | None, *, adapter: bool, takes_images: bool) -> str:
    from huggingface_hub import ModelCardData

    tags = ["cpo_fast", stage, *(["chest-x-ray", "radiology"] if has_reports(run) else [])]
    tags += ["preference-optimization", "dpo"] if stage == "cpo" else []
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if takes_images else "text-generation",
        tags=[*tags, *(["lora"] if adapter else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _describe_data(run: Run, stage: str) -> str:
    kind = data_kind(run)
    if has_reports(run):
        return (
            f"data of the kind `{kind}`. An answer of the data is a report and a diagnosis: "
            "`<think> report </think> The disease of this patient is ...`"
        )
    if not kind:
        return "data of unknown kind."
    used = run.part("data").get("used")
    count = f"; {format_number(used)} used" if is_number(used) else ""
    if stage in records_by_stage(run):
        trained_on, held_out = map(format_number, records_by_stage(run)[stage])
        count = f"; {trained_on} trained on, {held_out} held out"
    return f"preference rows of the format `{kind}`{count}."


def _describe_method(run: Run, stage: str) -> str:
    if stage == "sft":
        what = "reports and diagnoses of the data set" if has_reports(run) else "chosen answers"
        return f"It was trained on the {what}."
    text = f"It was trained to prefer {describe_preference(run)}"
    if has_reports(run):
        sources = counts(run.part("data", "counterfactual_sources"))
        papers = [PAPERS["cpo"], *([PAPERS["perception"]] if sources.get("perception") else [])]
        loss = str(run.config.get("loss_type") or "sigmoid")
        other = "" if loss == "sigmoid" else f", here with the loss `{loss}`"
        text += f" (method: {', '.join(papers)}{other})"
    return f"{text}. {describe_reference(run)}"


def _usage_code(base: str, *, adapter: bool, takes_images: bool) -> str:
    """`base` is a hub's name, or the path in the adapter's own configuration."""
    auto = "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", "", 'folder = "..."  # this folder']
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        if base.startswith("."):
            lines.append(f'base = folder + "/{base}"')
        elif base and not Path(base).is_absolute():
            lines.append(f'base = "{base}"')
        else:  # a local path is private
            lines.append(f'base = "..."  # {Path(base).name or "the model it was trained on"}')
        lines.append(f"model = {auto}.from_pretrained(base)")
        lines.append("model = PeftModel.from_pretrained(model, folder)")
    else:
        lines.append(f"model = {auto}.from_pretrained(folder)")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    return "\n".join(["```python", *lines, "```"])


def _base_of_adapter(folder: Path) -> str:
    """The path or name of the base in adapter_config.json, "" if it is missing."""
    return str(read_object(folder / CONFIG).get("base_model_name_or_path") or "")


def _data_table(run: Run, stage: str) -> Table:
    data = run.part("data")
    rows = [_row("Records read", data.get("read"))]
    if stage in records_by_stage(run):
        trained_on, held_out = records_by_stage(run)[stage]
        rows += [_row("Records trained on", trained_on), _row("Records held out", held_out)]
    else:
        rows.append(_row("Records used", data.get("used")))
    rejected = counts(data.get("rejected"))
    rows += [_row(f"Set aside: {reason}", count) for reason, count in rejected.items()]
    rows.append(_row("Left out by a flag", data.get("left_out") or None))
    made = counts(data.get("counterfactuals"))
    rows.append(_row("Counterfactuals", made.get("passed", made.get("read"))))
    sources = counts(data.get("counterfactual_sources"))
    rows += [_row(f"Counterfactuals, {source}", count) for source, count in sources.items()]
    return Table("", ("", "Number"), tuple(row for row in rows if row.cells[0].text != "–"))


def _settings_table(config: Mapping[str, Any], stage: str, adapter: bool) -> Table:
    own = sorted(name.removeprefix("sft_") for name in config if name.startswith("sft_"))
    names = [name for name in own if name in config and name not in SHARED]
    prefix = "sft_" if stage == "sft" else ""
    values = {name: config.get(prefix + name) for name in names}
    for name in SHARED:
        values[name] = config.get(name)
        if prefix and config.get(prefix + name) is not None:
            values[name] = config[prefix + name]
    if stage == "cpo":
        values |= {name: config.get(name) for name in OF_CPO}
    if not values.get("use_peft", adapter):
        values = {name: value for name, value in values.items() if name not in LORA}
    if config.get("world_size", 1) > 1:
        values["processes"] = config["world_size"]
    unused = "num_train_epochs" if (values.get("max_steps") or 0) > 0 else "max_steps"
    rows = [
        Row(f"`{name}`", (Cell(value if isinstance(value, str) else json.dumps(value)),))
        for name, value in values.items()
        if value is not None and name != unused
    ]
    return Table("", ("Flag", "Value"), tuple(rows))


def _training_table(run: Run, stage: str) -> Table:
    part = run.part("stages", stage)
    rows = [_row("Optimiser steps", part.get("steps"))]
    rows.append(Row("Wall time", (Cell(format_seconds(part.get("seconds"))),)))
    speed = speed_table(replace(run, summary={"stages": {stage: part}}))
    rows += [row for row in speed.rows if " per second" in row.head] if speed else []
    for name, value in run.part("stages", stage, "final").items():
        if name == "loss" or name.startswith(("eval_", "rewards/")):
            rows.append(_row(f"Last `{name}`", value))
    versions = run.part("versions")
    device = run.part("hardware").get("device")
    used = [f"{name} {value}" for name, value in versions.items()]
    note = f"Computed {f'on {device} ' if device else ''}with {', '.join(used)}."
    return Table("", ("", name_of(stage)), tuple(rows), note if versions else "")


def _row(head: str, value: Any) -> Row:
    return Row(head, (number_cell(value),))
