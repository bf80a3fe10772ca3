"""The top of the page: the main result with its interval, the cards, model, data and hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.report import tables as t
from cpo_fast.report.describe import has_reports, records_by_stage
from cpo_fast.report.evaluation_tables import NONE_PARSED, unparsed, unparsed_share
from cpo_fast.report.read import Run, counts, get, is_number, objects

BASELINES = ("majority", "untrained")
HEADLINES = {"accuracy": "accuracy", "f1": "F1"}


def headline(evaluation: Mapping[str, Any]) -> str:
    """The last trained model compared with SFT and with the majority guess, then its accuracy, all
    with intervals; "" without a diagnosis."""
    models = objects(evaluation.get("classification"))
    last = last_trained(models)
    if last is None:
        return ""
    if unparsed(models[last]) == NONE_PARSED:
        return f"No answer of {t.name_of(last)} can be parsed, so there is no accuracy to compare."
    sentences = [
        describe_comparison(evaluation, last, other)
        for other in ("sft", "majority")
        if other in models and other != last
    ]
    figure = get(models[last], "macro", "accuracy")
    bounds = t.format_interval(figure)
    interval = f" (95 % interval {bounds})" if bounds else ""
    studies, split = evaluation.get("studies", "?"), evaluation.get("split", "?")
    sentences.append(
        f"{t.name_of(last)}: {t.format_percent(figure.get('value'))} accuracy{interval}, mean over "
        f"findings, {counted(studies, 'study', 'studies')} of the {split} split."
    )
    if share := unparsed_share(models[last]):
        sentences.append(f"{share} of its answers cannot be parsed and count as wrong.")
    return " ".join(sentence for sentence in sentences if sentence)


def last_trained(models: Mapping[str, Any]) -> str | None:
    """The last model that is not a baseline."""
    names = [name for name in models if name not in BASELINES]
    return names[-1] if names else None


def describe_comparison(evaluation: Mapping[str, Any], model: str, other: str) -> str:
    """The paired differences in accuracy and F1 and their significance; "" if none is known."""
    found = get(objects(evaluation.get("differences")), f"{model} - {other}")
    parts = [describe_difference(label, get(found, key)) for key, label in HEADLINES.items()]
    differences = "; ".join(part for part in parts if part)
    name = "the majority guess" if other == "majority" else t.name_of(other)
    if share := unparsed(get(objects(evaluation.get("classification")), other)):
        name += f" ({share})"
    return f"{t.name_of(model)} compared with {name}: {differences}." if differences else ""


def describe_difference(metric: str, figure: Mapping[str, Any]) -> str:
    """For example "no significant difference in accuracy, +0.1 points (−0.7 to +0.9)"."""
    value: Any = figure.get("value")
    if not is_number(value):
        return ""
    significant = t.significant(figure)
    if significant is None:
        return f"{metric} {t.format_points(value)} points, significance not tested"
    what = f"no significant difference in {metric}"
    if significant:
        what = f"significantly {'higher' if value > 0 else 'lower'} {metric}"
    return f"{what}, {t.format_points(value)} points ({t.format_interval(figure, t.format_points)})"


def cards(run: Run) -> list[dict[str, str]]:
    """The figures below the headline, each {"label", "value", "note"}."""
    cards = []
    evaluation = run.part("evaluation")
    models = objects(evaluation.get("classification"))
    last = last_trained(models)
    if last and unparsed(models[last]) != NONE_PARSED:
        for metric, label in (("accuracy", "Accuracy"), ("f1", "F1")):
            figure = get(models, last, "macro", metric)
            note = f"{t.name_of(last)}, mean over findings, {t.format_interval(figure)}"
            note += f"; {share}" if (share := unparsed(models[last])) else ""
            if last != "sft" and (against := _against_sft(evaluation, last, metric)):
                note += f"; {against}"
            value = t.format_percent(figure.get("value"))
            cards.append({"label": label, "value": value, "note": note})
    cards += _preference_card(objects(run.part("evaluation", "preference")))
    speed = run.part("stages", "cpo")
    if is_number(speed.get("pairs_per_second")):
        note = f"CPO; {t.format_number(speed.get('logical_tokens_per_second'))} logical tokens/s"
        value = t.format_number(speed["pairs_per_second"])
        cards.append({"label": "Pairs per second", "value": value, "note": note})
    data = run.part("data")
    if is_number(data.get("used")):
        rejected = sum(counts(data.get("rejected")).values())
        note = f"of {t.format_number(data.get('read'))} read, {t.format_number(rejected)} set aside"
        what, used = "used", data["used"]
        if by_stage := records_by_stage(run):
            what, (used, held_out) = "trained on", list(by_stage.values())[-1]
            held = f"{t.format_number(held_out)} held out"
            note = "; ".join([*_other_stages(by_stage), held, note])
        label = f"{'Studies' if has_reports(run) else 'Records'} {what}"
        cards.append({"label": label, "value": t.format_number(used), "note": note})
    times = {name: stage.get("seconds") for name, stage in objects(run.part("stages")).items()}
    if known := counts(times):
        note = ", ".join(map(t.name_of, known))
        value = t.format_seconds(sum(known.values()))
        cards.append({"label": "Time", "value": value, "note": note})
    return cards


def _preference_card(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Reward accuracy of the first model; without rewards, how often the chosen answer is more
    likely."""
    wanted = {"accuracy": "Reward accuracy", "policy_accuracy": "Chosen answer more likely"}
    for name in t.in_order(models)[:1]:
        for key, label in wanted.items():
            if not (figure := get(models[name], key)):
                continue
            what = "held-out pair" if name == "cpo" else "pair"
            pairs = counted(models[name].get("pairs", 0), what, show=t.format_number)
            note = f"{t.name_of(name)}, {pairs}"
            note += f", {bounds}" if (bounds := t.format_interval(figure)) else ""
            return [{"label": label, "value": t.format_percent(figure.get("value")), "note": note}]
    return []


def _other_stages(by_stage: Mapping[str, tuple[int, int]]) -> list[str]:
    """The last stage, and the earlier stages that had other numbers of records."""
    *earlier, last = by_stage
    other = [name for name in earlier if by_stage[name] != by_stage[last]]
    numbers = [f"{t.name_of(name)} {t.format_number(by_stage[name][0])}" for name in other]
    return [f"{t.name_of(last)} ({', '.join(numbers)})"] if numbers else []


def _against_sft(evaluation: Mapping[str, Any], model: str, metric: str) -> str:
    found = get(objects(evaluation.get("differences")), f"{model} - sft", metric)
    value = get(objects(evaluation.get("classification")), "sft", "macro", metric).get("value")
    significant = t.significant(found)
    if not is_number(value) or significant is None:
        return ""
    return f"SFT {t.format_percent(value)}, {'a' if significant else 'no'} significant difference"


def list_inputs(run: Run) -> list[str]:
    """The starting model of a run, its data set and its seed."""
    labels = {
        "model_name_or_path": "model",
        "model": "model",  # of cpo-fast evaluate
        "dataset": "data set",
        "seed": "seed",
    }
    if run.config.get("sft_checkpoint"):  # replaces the model
        labels["sft_checkpoint"] = "from the SFT checkpoint"
        del labels["model_name_or_path"]
    return [f"{label} {run.config[key]}" for key, label in labels.items() if key in run.config]


def describe_environment(run: Run) -> str:
    """Hardware and main versions of a run, as far as summary.json has them."""
    versions, hardware = run.part("versions"), run.part("hardware")
    on = [str(hardware["device"])] if hardware.get("device") else []
    for key, one, several in COUNTED:
        count: Any = hardware.get(key)
        if is_number(count):
            on.append(counted(count, one, several))
    used = [f"{name} {versions[name]}" for name in VERSIONS if versions.get(name)]
    if commit := versions.get("commit"):
        used.append(f"commit {str(commit)[:10]}")
    parts = [f"on {', '.join(on)}"] if on else []
    parts += [f"with {', '.join(used)}"] if used else []
    return f"Computed {' '.join(parts)}" if parts else ""


COUNTED = (("processes", "process", "processes"), ("threads", "CPU thread", "CPU threads"))
VERSIONS = ("cpo_fast", "torch", "transformers", "python")


def describe_protocol(evaluation: Mapping[str, Any]) -> str:
    """How the diagnosis is scored, without the letter of the protocol."""
    text = str(evaluation.get("protocol") or "")
    first, colon, rest = text.partition(": ")
    text = rest if colon and len(first) == 1 else text
    return f"Scoring: {text}." if text else ""
