"""The top of the page: the main result with its interval, the cards, what it was computed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.report import tables as t
from cpo_fast.report.evaluation_tables import NONE_PARSED, unparsed
from cpo_fast.report.read import Run
from cpo_fast.report.words import of_reports, sides

BASELINES = ("majority", "untrained")
HEADLINES = {"accuracy": "accuracy", "f1": "F1"}


def headline(evaluation: Mapping[str, Any]) -> str:
    """The last trained model compared with SFT and with the majority guess, then its accuracy, all
    with their intervals; "" without a diagnosis."""
    models = t.objects(evaluation.get("classification"))
    last = trained(models)
    if last is None:
        return ""
    share = unparsed(models[last])
    if share == NONE_PARSED:
        return f"No answer of {t.name_of(last)} can be parsed, so there is no accuracy to compare."
    sentences = [
        comparison(evaluation, last, other)
        for other in ("sft", "majority")
        if other in models and other != last
    ]
    figure = t.get(models[last], "macro", "accuracy")
    bounds = t.interval(figure)
    spread = f" (95 % interval {bounds})" if bounds else ""
    studies, split = evaluation.get("studies", "?"), evaluation.get("split", "?")
    sentences.append(
        f"{t.name_of(last)}: {t.percent(figure.get('value'))} accuracy{spread}, mean over "
        f"findings, {counted(studies, 'study', 'studies')} of the {split} split."
    )
    if share:
        lost = share.removesuffix(" not parsed").removesuffix(" answers").removesuffix(" answer")
        sentences.append(f"{lost} of its answers cannot be parsed and count as wrong.")
    return " ".join(sentence for sentence in sentences if sentence)


def trained(models: Mapping[str, Any]) -> str | None:
    """The last model that was trained, or any that is no baseline."""
    names = [name for name in models if name not in BASELINES]
    return names[-1] if names else None


def comparison(evaluation: Mapping[str, Any], model: str, other: str) -> str:
    """A sentence on the paired differences in accuracy and F1, and whether they are significant;
    "" where none is known."""
    found = t.get(t.objects(evaluation.get("differences")), f"{model} - {other}")
    parts = [difference_words(label, t.get(found, key)) for key, label in HEADLINES.items()]
    told = "; ".join(part for part in parts if part)
    name = "the majority guess" if other == "majority" else t.name_of(other)
    if share := unparsed(t.get(t.objects(evaluation.get("classification")), other)):
        name += f" ({share})"
    return f"{t.name_of(model)} compared with {name}: {told}." if told else ""


def difference_words(metric: str, figure: Mapping[str, Any]) -> str:
    """Such as "no significant difference in accuracy, +0.1 points (−0.7 to +0.9)"."""
    value: Any = figure.get("value")
    if not t.is_number(value):
        return ""
    sure = t.significant(figure)
    if sure is None:
        return f"{metric} {t.points(value)} points, significance not tested"
    what = f"no significant difference in {metric}"
    if sure:
        what = f"significantly {'higher' if value > 0 else 'lower'} {metric}"
    return f"{what}, {t.points(value)} points ({t.interval(figure, t.points)})"


def cards(run: Run) -> list[dict[str, str]]:
    """The figures below the headline, each {"label", "value", "note"}."""
    cards = []
    evaluation = run.part("evaluation")
    models = t.objects(evaluation.get("classification"))
    last = trained(models)
    if last and unparsed(models[last]) != NONE_PARSED:
        for metric, label in (("accuracy", "Accuracy"), ("f1", "F1")):
            figure = t.get(models, last, "macro", metric)
            note = f"{t.name_of(last)}, mean over findings, {t.interval(figure)}"
            note += f"; {share}" if (share := unparsed(models[last])) else ""
            if last != "sft" and (against := _against_sft(evaluation, last, metric)):
                note += f"; {against}"
            cards.append({"label": label, "value": t.percent(figure.get("value")), "note": note})
    cards += _preferred(t.objects(run.part("evaluation", "preference")))
    speed = run.part("stages", "cpo")
    if t.is_number(speed.get("pairs_per_second")):
        note = f"CPO; {t.number(speed.get('logical_tokens_per_second'))} logical tokens/s"
        value = t.number(speed["pairs_per_second"])
        cards.append({"label": "Pairs per second", "value": value, "note": note})
    data = run.part("data")
    if t.is_number(data.get("used")):
        rejected = sum(t.counts(data.get("rejected")).values())
        note = f"of {t.number(data.get('read'))} read, {t.number(rejected)} set aside"
        what, used = "used", data["used"]
        if of_stages := sides(run):
            what, (used, held_out) = "trained on", list(of_stages.values())[-1]
            note = "; ".join([*_earlier(of_stages), f"{t.number(held_out)} held out", note])
        label = f"{'Studies' if of_reports(run) else 'Records'} {what}"
        cards.append({"label": label, "value": t.number(used), "note": note})
    times = [s.get("seconds") for s in run.part("stages").values() if isinstance(s, dict)]
    if known := [x for x in times if t.is_number(x)]:
        cards.append({"label": "Time", "value": t.seconds(sum(known)), "note": _timed(run)})
    return cards


def _preferred(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The first model's reward accuracy, or how often the chosen answer is more likely where it has
    no rewards."""
    wanted = {"accuracy": "Reward accuracy", "policy_accuracy": "Chosen answer more likely"}
    for name in t.in_order(models)[:1]:
        for key, label in wanted.items():
            if not (figure := t.get(models[name], key)):
                continue
            what = "held-out pair" if name == "cpo" else "pair"
            note = (
                f"{t.name_of(name)}, {counted(models[name].get('pairs', 0), what, show=t.number)}"
            )
            note += f", {bounds}" if (bounds := t.interval(figure)) else ""
            return [{"label": label, "value": t.percent(figure.get("value")), "note": note}]
    return []


def _earlier(of_stages: Mapping[str, tuple[int, int]]) -> list[str]:
    """Which stage a number of records belongs to, where the stages before it had others."""
    *earlier, last = of_stages
    other = [name for name in earlier if of_stages[name] != of_stages[last]]
    said = [f"{t.name_of(name)} {t.number(of_stages[name][0])}" for name in other]
    return [f"{t.name_of(last)} ({', '.join(said)})"] if said else []


def _against_sft(evaluation: Mapping[str, Any], model: str, metric: str) -> str:
    found = t.get(t.objects(evaluation.get("differences")), f"{model} - sft", metric)
    value = t.get(t.objects(evaluation.get("classification")), "sft", "macro", metric).get("value")
    sure = t.significant(found)
    if not t.is_number(value) or sure is None:
        return ""
    return f"SFT {t.percent(value)}, {'a' if sure else 'no'} significant difference"


def _timed(run: Run) -> str:
    """The stages whose time is known, in words."""
    timed = [
        name for name, s in t.objects(run.part("stages")).items() if t.is_number(s.get("seconds"))
    ]
    return ", ".join(t.name_of(name) for name in timed)


def setting(run: Run) -> list[str]:
    """What a run started from, its data set and its seed."""
    labels = {
        "model_name_or_path": "model",
        "model": "model",  # of cpo-fast evaluate
        "dataset": "data set",
        "seed": "seed",
    }
    if run.config.get("sft_checkpoint"):  # takes the place of the model
        labels["sft_checkpoint"] = "from the SFT checkpoint"
        del labels["model_name_or_path"]
    return [f"{label} {run.config[key]}" for key, label in labels.items() if key in run.config]


def computed_on(run: Run) -> str:
    """A line with the hardware and the main versions of a run, as far as summary.json has them."""
    versions, hardware = run.part("versions"), run.part("hardware")
    on = [str(hardware["device"])] if hardware.get("device") else []
    for key, one, several in COUNTED:
        count: Any = hardware.get(key)
        if t.is_number(count):
            on.append(counted(count, one, several))
    used = [f"{name} {versions[name]}" for name in VERSIONS if versions.get(name)]
    if commit := versions.get("commit"):
        used.append(f"commit {str(commit)[:10]}")
    parts = [f"on {', '.join(on)}"] if on else []
    parts += [f"with {', '.join(used)}"] if used else []
    return f"Computed {' '.join(parts)}" if parts else ""


COUNTED = (("processes", "process", "processes"), ("threads", "CPU thread", "CPU threads"))
VERSIONS = ("cpo_fast", "torch", "transformers", "python")


def protocol(evaluation: Mapping[str, Any]) -> str:
    """How the diagnosis is scored, in words; the letter of the protocol is left out."""
    words = str(evaluation.get("protocol") or "")
    first, colon, rest = words.partition(": ")
    words = rest if colon and len(first) == 1 else words
    return f"How it is scored: {words}." if words else ""
