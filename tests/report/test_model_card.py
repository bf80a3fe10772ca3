"""The model card: the hub's header and the run's figures, without patient data or local paths."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpo_fast.report import write_report
from cpo_fast.report.describe import describe_reference, shared_stage_title
from cpo_fast.report.model_card import card_of_export, hub_name, write_cards
from cpo_fast.report.read import Run
from cpo_fast.testing.runs import parse_arguments
from tests.report.samples import REPORT, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: a CPO adapter with images, an SFT checkpoint and the merged SFT model."""
    folder = write_run(tmp_path / "run")
    flags = ["--dataset", str(tmp_path / "secret"), "--preset", "paper", "--beta", "0.25",
             "--counterfactual_sources", "thinking,perception"]  # fmt: skip
    config = asdict(parse_arguments(flags)) | {"world_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    summary = json.loads((folder / "summary.json").read_text())
    for stage, step in (("sft", 6), ("cpo", 4)):
        checkpoint = folder / stage / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "preprocessor_config.json").write_text("{}")
        (checkpoint / "adapter_config.json").write_text("{}")
        # the folder of the run has been moved
        summary["stages"].setdefault(stage, {})["checkpoint"] = f"/elsewhere/{checkpoint.name}"
    (folder / "sft" / "merged").mkdir()
    summary["data"] |= {"kind": "mimic-cxr", "counterfactuals": {"made": 15, "passed": 12}}
    summary["data"]["counterfactual_sources"] = {"thinking": 8, "perception": 4}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def header(path: Path) -> dict[str, Any]:
    _, yaml_part, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(yaml_part)


def test_header_has_hub_metadata(run: Path) -> None:
    folders = [path.parent.name for path in write_cards(run)]
    assert folders == ["checkpoint-6", "merged", "checkpoint-4"]
    found = header(run / "cpo" / "checkpoint-4" / "README.md")
    assert found["library_name"] == "peft" and found["pipeline_tag"] == "image-text-to-text"
    assert {"cpo", "dpo", "lora", "cpo_fast"} <= set(found["tags"])
    assert "base_model" not in found  # a local folder has no name on a hub
    merged_card = header(run / "sft" / "merged" / "README.md")
    assert merged_card["library_name"] == "transformers"
    assert merged_card["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ("../../base", 'base = folder + "/../../base"'),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 'base = "Qwen/Qwen2.5-VL-3B-Instruct"'),
        ("/home/someone/models/mine", 'base = "..."  # mine'),
        (None, 'base = "..."  # the model it was trained on'),
    ],
)
def test_base_of_an_adapter_is_named(run: Path, named: str | None, line: str) -> None:
    config = run / "cpo" / "checkpoint-4" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": named}))
    write_cards(run)
    card = (config.parent / "README.md").read_text(encoding="utf-8")
    assert f"\n{line}\n" in card and "someone" not in card
    assert 'folder = "..."  # this folder' in card


def test_run_from_an_sft_checkpoint_names_it(run: Path) -> None:
    file = run / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"sft_checkpoint": "/home/someone/runs/sft/finding-tuned"}))
    write_cards(run)
    card = (run / "cpo" / "checkpoint-4" / "README.md").read_text(encoding="utf-8")
    assert "# The SFT checkpoint finding-tuned, CPO" in card and "someone" not in card
    assert "tiny" not in card.split("\n# ")[1].split("\n")[0]


def test_card_has_figures_and_settings_and_nothing_private(run: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    path = next(path for path in write_cards(run) if path.parent.name == "checkpoint-4")
    card = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o600
    summary = json.loads((run / "summary.json").read_text())
    assert "| `beta` | 0.25 |" in card and "| `learning_rate` | 2e-05 |" in card
    assert "| `counterfactual_sources` | thinking,perception |" in card
    assert "| `processes` | 2 |" in card and "sft_" not in card
    assert "| Counterfactuals, perception | 4 |" in card and "2604.15705" in card
    for reason in summary["data"]["rejected"]:
        assert f"| Set aside: {reason} |" in card
    assert "### Diagnosis, overall" in card and "### Preference for the chosen answer" in card
    for private in (REPORT, *REPORT.split("."), "secret", str(run), "/elsewhere", "/data/"):
        assert len(private.strip()) < 4 or private.strip() not in card, private
    ids = [json.loads(line)["id"] for line in (run / "rejected_records.jsonl").open()]
    assert ids and not any(name in card for name in ids if len(name) > 3)
    sft = (run / "sft" / "checkpoint-6" / "README.md").read_text(encoding="utf-8")
    assert "| `learning_rate` | 0.0001 |" in sft and "| `lr_scheduler_type` | cosine_with" in sft
    assert "max_steps" not in card and "on data of the kind `mimic-cxr`" in card
    assert "`beta`" not in sft and "`max_length` | 2048" in sft


def test_export_gets_the_card_of_its_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert card_of_export(run / "cpo" / "checkpoint-4", out) == out / "README.md"
    assert header(out / "README.md")["library_name"] == "transformers"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "It is the adapter `checkpoint-4` of the run, merged into its base model. " in card
    assert "The evaluation below was made before the merge." in card
    earlier = run / "cpo" / "checkpoint-2"
    earlier.mkdir()
    card_of_export(earlier, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "evaluation below are from `checkpoint-4`, not from this checkpoint." in card
    assert card_of_export(tmp_path / "alone" / "x" / "adapter", out) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/0a1b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B"),
        ("/models/Qwen2.5-VL-3B", None),
        ("../models", None),
        ("tiny", None),
    ],
)
def test_name_of_the_base_model_on_a_hub(path: str, name: str | None) -> None:
    assert hub_name({"model_name_or_path": path}) == name


def test_card_of_user_rows_claims_no_reports(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["data"] = {"kind": "trl", "read": 30, "used": 24, "rejected": {}}
    summary["data"] |= {"trained_on": {"cpo": 18}, "held_out": {"cpo": 6}}
    del summary["stages"]["sft"]
    (run / "summary.json").write_text(json.dumps(summary))
    config = json.loads((run / "config.json").read_text())
    config |= {"stages": "cpo", "loss_type": "hinge", "counterfactual_sources": "thinking"}
    (run / "config.json").write_text(json.dumps(config))
    cards = {path.parent.name: path for path in write_cards(run)}
    card = cards["checkpoint-4"].read_text(encoding="utf-8")
    assert "preference rows of the format `trl`; 18 trained on, 6 held out." in card
    assert "| Records trained on | 18 |\n| Records held out | 6 |" in card
    assert "Records used" not in card
    assert "to prefer the chosen to the rejected answers of the data" in card
    assert "The reference is the model that the run started from." in card
    top = card.split("## Hyper-parameters")[0]
    for claim in ("think", "report", "radiolog", "counterfactual", "chest", "SFT", "2505.13081"):
        assert claim not in top, claim
    merged = cards["merged"].read_text(encoding="utf-8")
    assert "; 24 used." in merged and "| Records used | 24 |" in merged  # not trained in this run
    assert "It was trained on the chosen answers." in merged
    page = write_report(run).read_text(encoding="utf-8")
    assert "Records trained on" in page and "6 held out; of 30 read, 0 set aside" in page
    assert "The model learns to prefer the chosen to the rejected answers of the data." in page
    assert "to its counterfactual" not in page and "Studies used" not in page
    assert "<h2>Preference optimisation</h2>" in page


def edit(run: Path, stage: str, *, summary: Any = None, **config: Any) -> str:
    """The card of `stage` after a change to config.json and summary.json."""
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    path = run / "summary.json"
    found = json.loads(path.read_text())
    for key, value in (summary or {}).items():
        found[key] = value
    path.write_text(json.dumps(found))
    cards = {card.parent.parent.name: card for card in write_cards(run) if "check" in str(card)}
    return cards[stage].read_text(encoding="utf-8")


def test_card_without_evaluation_refers_to_none(run: Path) -> None:
    card = edit(run, "cpo", summary={"evaluation": {}})
    assert "It was not evaluated. Do not use it for diagnosis." in card
    assert "as below" not in card and "## Evaluation" not in card
    figures = {"pairs": 3, "policy_accuracy": {"value": 0.5, "interval": [0.1, 0.9]}}
    summary = {"evaluation": {"preference": {"cpo": figures}}}
    assert "It was evaluated only as shown below." in edit(run, "cpo", summary=summary)
    assert "It was not evaluated; the evaluation below is of another" in edit(run, "sft")


def test_held_out_pairs_name_their_split(run: Path) -> None:
    """A run on a preference file has no test split and uses the validation split."""
    pairs = {"pairs": 6, "accuracy": {"value": 0.8, "interval": [0.5, 1.0]}, "split": "validate"}
    data = {"kind": "trl", "read": 24, "used": 24, "rejected": {}}
    card = edit(run, "cpo", summary={"evaluation": {"preference": {"cpo": pairs}}, "data": data})
    assert "Held-out pairs." in card and "test split" not in card
    assert "studies" not in card.split("## Evaluation")[1]


def test_method_follows_the_pair_sources(run: Path) -> None:
    both = edit(run, "cpo")
    assert "a study's report and diagnosis to a counterfactual of them, and an answer" in both
    data = {"kind": "mimic-cxr", "counterfactual_sources": {"perception": 4}}
    card = edit(run, "cpo", summary={"data": data}, loss_type="hinge")
    assert "to prefer an answer with its own image to the same answer with another" in card
    assert "a counterfactual of them" not in card and "here with the loss `hinge`" in card
    assert "ln 2" not in card and "The answers" not in card
    assert "An answer of the data is a report and a diagnosis" in card
    sft = edit(run, "sft")
    assert "It was trained on the reports and diagnoses of the data set." in sft
    assert "eference" not in sft.split("## Data")[0]
    assert "Computed on Some GPU with cpo_fast 0.1.0, torch 2.13.0" in sft


def test_stage_title_fits_all_runs(run: Path) -> None:
    of_reports, other = (Run(run, summary={"data": {"kind": kind}}) for kind in ("ccf", "trl"))
    assert shared_stage_title([of_reports, other], "cpo") == "Preference optimisation"
    assert shared_stage_title([of_reports] * 2, "cpo") == "Counterfactual preference optimisation"


def test_reference_is_described(run: Path) -> None:
    def sentence(**config: Any) -> str:
        return describe_reference(Run(run, config=config))

    assert sentence(stages="cpo", loss_type="sigmoid") == (
        "The reference is the model that the run started from, so the loss starts at ln 2 = 0.693 "
        "and the rewards at 0."
    )
    zero = "The reference is the model that the run started from, so the rewards start at 0."
    assert sentence(stages="cpo", rpo_alpha=1.0) == zero, "the loss has another part"
    weights = {"normalize_source_weights": False, "perception_weight": 0.5}
    assert sentence(stages="cpo", **weights) == zero
    assert "ln 2" in sentence(stages="cpo", perception_weight=0.5)
    assert "SFT model" in sentence(stages="sft,cpo") and "SFT" in sentence(sft_checkpoint="x")
    assert sentence(loss_type="simpo") == "The loss simpo has no reference model."


def test_run_without_a_checkpoint_gets_no_card(tmp_path: Path) -> None:
    assert write_cards(write_run(tmp_path / "run")) == []
