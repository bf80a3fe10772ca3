"""`python -m cpo_fast.evaluate`: from a data set and a model folder to figures and a page."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.data.lengths import load_tokenizer
from cpo_fast.errors import DataError, UsageError
from cpo_fast.evaluate import main, open_model, write_results
from cpo_fast.evaluate_options import parse_arguments, resolve_model
from cpo_fast.evaluation.cohort import read_cohort
from cpo_fast.evaluation.run import evaluate
from cpo_fast.evaluation.suites import Options, generate_answers, score_zero_shot
from cpo_fast.evaluation.summary import build_summary, choose_examples, write_examples
from cpo_fast.loss import processor
from cpo_fast.model.build import add_lora, load_model, save_model
from cpo_fast.phantom import write_phantom
from cpo_fast.testing.samples import images, tokenizer, vision_language_model
from cpo_fast.types import Counterfactual, ImageRef, Report, Study


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", num_studies=60, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "random"
    save_model(vision_language_model(), folder, tokenizer=tokenizer(), images=images())
    return folder


@pytest.fixture
def force_thoughts(monkeypatch):
    """Wrap the random model's answers in thoughts, except the first `number`."""

    def use(number):
        def generate(*parts):
            answers, kept = generate_answers(*parts)
            output = [
                f"<think> lungs {a.replace('<think>', '')} </think> x" for a in answers[number:]
            ]
            return ["no thought"] * number + output, kept

        monkeypatch.setattr("cpo_fast.evaluation.run.generate_answers", generate)

    return use


def test_drift_needs_thoughts_and_counts_others(data, model, tmp_path, capsys, force_thoughts):
    arguments = [str(part) for part in (
        "--model", model, "--dataset", data, "--output_dir", tmp_path / "out", "--max_samples", 2,
        "--max_new_tokens", 4, "--suite", "report,drift")]  # fmt: skip
    force_thoughts(2)
    assert main(arguments) == 1
    assert "none of 2 answers of random has a thought" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    assert "text" in written and "drift" not in written  # other suites are written
    force_thoughts(1)
    assert main(arguments) == 0
    assert "drift: 1 of 2 answers left out: no thought" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]["drift"]
    assert (found["random"]["studies"], found["random"]["without_thought"]) == (1, 1)


def test_all_suites_on_the_phantom(data, model, tmp_path, capsys, force_thoughts):
    force_thoughts(0)
    out = tmp_path / "out"
    arguments = ["--model", model, "--dataset", data, "--output_dir", out, "--max_samples", 3,
                 "--max_new_tokens", 8, "--drift_samples", 1, "--suite",
                 "classification,report,zero_shot,drift"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    evaluation = json.loads((out / "summary.json").read_text())["evaluation"]
    assert set(evaluation["classification"]) == {"majority", "random"}
    assert evaluation["classification"]["random"]["studies"] == 3
    assert set(evaluation["text"]["random"]) >= {"bleu_1", "bleu_4", "rouge_l"}
    assert set(evaluation["zero_shot"]["random"]["findings"]) == set(LABEL_NAMES)
    assert evaluation["drift"]["random"]["studies"] == 1
    page = (out / "report.html").read_text()
    assert "Zero-shot AUC" in page and "Drift of the diagnosis" in page
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / "evaluation.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"--suite": "accuracy"}, 2, "choose from classification,report"),
        ({"--model": "gone"}, 2, "no such model folder"),
        ({"--dataset": "gone"}, 2, "no such file or folder"),
        ({"--dataset": "gone", "--model": "gone"}, 2, "no such file or folder"),  # the first error
    ],
)
def test_bad_input_is_named(data, model, tmp_path, capsys, changed, status, message):
    flags = {"--model": model, "--dataset": data, "--output_dir": tmp_path / "out"} | changed
    assert main([str(word) for pair in flags.items() for word in pair]) == status
    assert message in capsys.readouterr().err


def test_missing_images_are_left_out_and_listed(data, model, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    flags = ["--model", model, "--dataset", copy, "--output_dir", tmp_path / "out",
             "--max_samples", "4", "--max_new_tokens", "2"]  # fmt: skip
    args = parse_arguments([str(flag) for flag in flags])
    _, checkpoint, loaded = open_model(args)
    cohort = read_cohort(checkpoint, args.dataset, max_samples=4)
    options = Options(suites=(), max_new_tokens=2)
    assert cohort.read == len(cohort.studies) + len(cohort.rejected) + cohort.left_out
    first, second, *others = cohort.studies
    (copy / first.images[0].path).unlink()
    answers = evaluate({"m": lambda: loaded}, checkpoint, cohort, options).answers["m"]
    assert cohort.studies == [second, *others] and len(answers) == len(cohort.truth) == 3
    (copy / second.images[0].path).unlink()
    score_zero_shot(loaded, checkpoint, cohort, answers, options)
    assert cohort.studies == [second, *others]  # its answer still counts
    listed = [(one.id, one.reason, one.stage) for one in cohort.rejected]
    assert listed == [(first.study_id, "image-missing", ""),
                      (second.study_id, "image-missing", "zero_shot")]  # fmt: skip
    assert cohort.rejected[0].file.endswith(f"{first.study_id}.txt")
    args.output_dir.mkdir()
    write_results(args, cohort, {})
    found = json.loads((args.output_dir / "summary.json").read_text())["data"]
    assert found["rejected"] == {"image-missing": 1} and found["used"] == 3
    assert found["samples_set_aside"] == {"zero_shot": {"image-missing": 1}}
    for study in others:
        (copy / study.images[0].path).unlink()
    with pytest.raises(DataError, match="no sample could be read"):
        evaluate({"m": lambda: loaded}, checkpoint, cohort, options)


@pytest.mark.parametrize("bf16", [True, False])
def test_slow_bfloat16_gives_a_warning(model, monkeypatch, capsys, bf16):
    monkeypatch.setattr(processor, "fast_bfloat16", lambda: False)
    flags = ["--model", str(model), "--dataset", "d", "--output_dir", "o", "--max_pixels", "50000"]
    open_model(parse_arguments([*flags, *(["--bf16"] if bf16 else [])]))
    assert ("warning: bf16" in capsys.readouterr().err) is bf16


def test_tokenizer_of_another_model_is_named(data, model, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    larger = load_tokenizer(other)
    larger.add_tokens(["hilar", "apical"])
    larger.save_pretrained(other)
    flags = ["--model", str(other), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "the tokenizer's ids go up to" in capsys.readouterr().err


PAIRS = [
    {"prompt": "What is seen?", "chosen": "A small effusion.", "rejected": "No effusion."},
    {"prompt": "And the heart?", "chosen": "It is large.", "rejected": ""},  # set aside
    {"prompt": "What is new?", "chosen": "An opacity on the left.", "rejected": "Nothing."},
    {"prompt": "What else?", "chosen": "A nodule.", "rejected": "A cavity."},
]


def evaluate_pairs(model, folder, capsys, *flags):
    """`evaluate` on a file of PAIRS: (summary, report page)."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    out = folder / "out"
    flags = ["--model", str(model), "--dataset", str(file), "--output_dir", str(out), *flags]
    status = main(flags)
    output = capsys.readouterr()
    assert status == 0, output.err
    return json.loads((out / "summary.json").read_text()), (out / "report.html").read_text()


def sum_logps(model, prompt, answer, tok):
    ids = tok(prompt).input_ids
    answers = tok(answer).input_ids + [tok.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *answers]])).logits[0, len(ids) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answers)), answers].sum())


def test_preference_file_gives_the_share_of_preferred_answers(model, tmp_path, capsys):
    """A whole model is scored by its own log-probs, an adapter also against its base."""
    summary, page = evaluate_pairs(model, tmp_path, capsys)
    assert summary["data"]["read"] == 4 and summary["data"]["used"] == 3
    assert summary["data"]["rejected"] == {"empty-response": 1}
    (figures,) = summary["evaluation"]["preference"].values()
    tok, whole = load_tokenizer(model), load_model(model)

    def score_sides(policy):
        rows = [(row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS if row["rejected"]]
        sides = [[sum_logps(policy, p, answer, tok) for answer in pair] for p, *pair in rows]
        return torch.tensor(sides, dtype=torch.float64)

    base = score_sides(whole)
    assert figures.keys() == {"pairs", "policy_accuracy"} and figures["pairs"] == 3
    won = (base[:, 0] > base[:, 1]).double().mean()
    assert figures["policy_accuracy"]["value"] == pytest.approx(float(won))
    assert "Reward" not in page, "there is no reference"
    assert f"model {model} · data set" in page and "cpo_fast · evaluation" in page
    assert "summed over the tokens of an answer and not divided by its length" in page
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*.*")}
    assert modes == dict.fromkeys(
        ("config.json", "summary.json", "rejected_records.jsonl", "report.html"), 0o600
    )

    adapter = add_lora(whole, r=2, alpha=8)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_model(adapter, tmp_path / "adapter")
    summary, page = evaluate_pairs(tmp_path / "adapter", tmp_path, capsys, "--max_samples", "2")
    assert summary["data"]["left_out"] == 1
    figures, reference = summary["evaluation"]["preference"].values()
    won = (base[:2, 0] > base[:2, 1]).double().mean()
    assert reference.keys() == {"pairs", "policy_accuracy"} and reference["pairs"] == 2
    assert reference["policy_accuracy"]["value"] == pytest.approx(float(won))
    assert ">Reference<" in page
    rewards = 0.1 * (score_sides(adapter) - base)[:2]
    margins = rewards[:, 0] - rewards[:, 1]
    assert figures["pairs"] == 2 and "Reward accuracy" in page
    assert figures["accuracy"]["value"] == pytest.approx(float((margins > 0).double().mean()))
    assert figures["margin"]["value"] == pytest.approx(float(margins.mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("dataset", "flags", "message"),
    [
        ("pairs.jsonl", "--suite drift", "--suite drift has no effect: .* a preference file"),
        ("pairs.jsonl", "--split test", "--split test has no effect"),
        ("pairs.jsonl", "--uncertain_labels negative", "--uncertain_labels negative has no"),
        ("pairs.jsonl", "--max_new_tokens 9", "--max_new_tokens 9 has no effect"),
        ("pairs.jsonl", "--batch_size 32", "--batch_size 32 has no effect"),  # the default's value
        ("pairs.jsonl", "--drift-samples 3", "--drift_samples 3 has no effect"),
        ("pairs.jsonl", "--num_examples 0", "--num_examples 0 has no effect"),
        ("labels.csv", "--suite zero_shot", "--suite zero_shot has no effect: .* a CSV"),
        ("labels.csv", "--split train", "--split train has no effect"),
        ("labels.csv", "--beta 1", "--beta 1.0 has no effect"),
        ("labels.csv", "--dataset_format auto", "--dataset_format auto has no effect"),
        ("temporal.csv", "--uncertain_labels positive", "is MS-CXR-T, which has no uncertain"),
        ("studies", "--beta 1", "--beta 1.0 has no effect: .* studies, which have no pairs"),
        ("studies", "--drift_samples 3", "--drift_samples 3 is for --suite drift, and --suite is"),
        ("studies", "--packing_length 9", "--packing_length 9 is for --suite zero_shot"),
        ("studies", "--suite drift --seed 1", "--seed 1 is for --suite classification or report"),
    ],
)
def test_flag_without_effect_is_refused(tmp_path, capsys, dataset, flags, message):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]))
    (tmp_path / "labels.csv").write_text("Image Index,Finding Labels\n")
    (tmp_path / "temporal.csv").write_text("dicom_id,previous_dicom_id\n")
    given = ["--model", "m", "--dataset", tmp_path / dataset, "--output_dir", tmp_path / "out"]
    arguments = [*map(str, given), *flags.split()]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_flags_with_effect_are_accepted(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]))
    (tmp_path / "labels.csv").write_text("Image Index,Finding Labels\n")
    given = {
        "pairs.jsonl": "--beta 1 --seed 3 --max_samples 2 --packing_length 99 --bf16",
        "labels.csv": "--uncertain_labels positive --max_new_tokens 3 --batch_size 2 --seed 3",
        "studies": "--suite drift,zero_shot --drift_samples 3 --packing_length 99 --seed 3",
    }
    for dataset, flags in given.items():
        common = ["--model", "m", "--dataset", str(tmp_path / dataset), "--output_dir", "o"]
        found = parse_arguments([*common, *flags.split()])
        assert found.split == "test" and found.num_examples == 4, "defaults"


def test_adapter_flags_are_refused_for_a_whole_model(model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]))
    common = ["--model", str(model), "--dataset", str(tmp_path / "pairs.jsonl"), "--output_dir",
              str(tmp_path / "out")]  # fmt: skip
    for flag, message in (("--beta=0.5", "--beta 0.5 has no effect: it scales rewards"),
                          (f"--base_model={model}", "names an adapter's base")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            resolve_model(parse_arguments([*common, flag]))


def test_rewards_use_the_beta_of_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    checkpoint = run / "cpo" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIRS[0]))
    common = ["--dataset", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out")]

    def beta(*flags):
        args = resolve_model(parse_arguments([*common, "--model", str(checkpoint), *flags]))
        assert args.model == str(checkpoint)
        return args.beta

    assert beta() == 0.1
    assert "beta 0.1 (the default: the adapter is in no run's folder)" in (capsys.readouterr().out)
    (run / "config.json").write_text(json.dumps({"stages": "cpo", "beta": 0.4}))
    assert beta() == 0.4
    assert capsys.readouterr().out == f"beta 0.4 of the run {run.resolve()}\n"
    assert beta("--beta", "0.2") == 0.2


def test_other_results_are_not_replaced(data, model, tmp_path, capsys):
    """Folders of a training run, a model or a training stage are refused."""
    run = tmp_path / "run"
    (run / "cpo" / "checkpoint-2").mkdir(parents=True)
    before = {"config.json": '{"stages": "cpo"}', "summary.json": '{"stages": {}}'}
    for name, text in before.items():
        (run / name).write_text(text)
    held = {run: "a training run", model: "a model", run / "cpo": "the checkpoints of a training"}
    for folder, what in held.items():
        flags = ["--model", model, "--dataset", data, "--output_dir", folder]
        assert main(list(map(str, flags))) == 2
        error = capsys.readouterr().err
        assert f"--output_dir {folder} holds {what}" in error and "name another folder" in error
    assert {name: (run / name).read_text() for name in before} == before


def study(number: int, *names: str, image: ImageRef | None = None) -> Study:
    labels = dict.fromkeys(names, 1)
    images = (image,) if image else ()
    return Study(str(number), "1", Report(f"report {number}"), images, labels)


def test_summary_compares_models_in_their_order():
    truth = [("Edema",), ("Pneumonia",)] * 10
    right = [f"<think> a </think> The disease of this patient is {n[0]}." for n in truth]
    summary = build_summary(
        truth=truth,
        training_truth=[("Edema",)] * 3,
        answers={"untrained": ["?"] * 20, "sft": right},
        bootstrap=20,
    )
    assert summary["majority_guess"] == ["Edema"]
    assert list(summary["classification"]) == ["majority", "untrained", "sft"]
    assert summary["classification"]["untrained"]["unparsable"] == 20
    assert summary["classification"]["majority"]["exact_match"]["value"] == 0.5
    assert summary["classification"]["sft"]["macro"]["accuracy"]["value"] == 1.0
    assert summary["differences"]["sft - untrained"]["accuracy"]["value"] == 1.0
    assert set(summary["differences"]) == {
        "untrained - majority", "sft - majority", "sft - untrained"}  # fmt: skip
    assert summary["text"] == {}
    json.dumps(summary, allow_nan=False)


def test_examples_are_varied_and_have_counterfactuals_first(tmp_path):
    picture = ImageRef("a/b.png", root=str(tmp_path))
    studies = [study(1, "Edema"), study(2, "Edema", image=picture), study(3, "Edema"),
               study(4, "Pneumonia", image=ImageRef("x", data=b"x"))]  # fmt: skip
    changed = [Counterfactual(f"{n}/Pneumothorax", str(n), "1", (), "r", (), "Pneumothorax",
                              f"changed {n}", ()) for n in (2, 3, 4)]  # fmt: skip
    answers = {"sft": ["one", "two", "three", "four"]}
    examples = choose_examples(studies, answers, changed, count=4)
    assert [e["study_id"] for e in examples] == ["2", "4", "3", "1"]
    assert examples[0]["image"] == str((tmp_path / "a/b.png").resolve())
    assert examples[1]["image"] is None, "an image in memory has no path"
    assert examples[0]["answers"] == {"sft": "two"}
    assert examples[0]["counterfactual"] == "changed 2" and examples[3]["target"] is None
    path = write_examples(tmp_path, examples)
    assert json.loads(path.read_text())["examples"] == examples
