"""Evaluation figures against scikit-learn, nltk and cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import UsageError
from cpo_fast.evaluation import classification as c
from cpo_fast.evaluation import text
from cpo_fast.evaluation.bootstrap import study_weights
from cpo_fast.evaluation.preference import summarize_both_models, summarize_preference

ABC = ("Atelectasis", "Edema", "Pneumonia")


def random_labels(seed: int, studies: int, shares: tuple[float, ...]) -> list[tuple[str, ...]]:
    draws = np.random.default_rng(seed).random((studies, len(shares))) < np.array(shares)
    return [tuple(name for name, on in zip(LABEL_NAMES, row, strict=False) if on) for row in draws]


def matrix(names: list[tuple[str, ...]]) -> np.ndarray:
    return np.array([[name in row for name in LABEL_NAMES] for row in names])


def test_counts_equal_hand_computation():
    truth = [("Edema",), ("Edema", "Pneumonia"), ("Atelectasis",), ("Edema",)]
    predicted = [("Edema",), ("Pneumonia",), ("Atelectasis", "Edema"), None]
    result = c.classification(truth, predicted, findings=ABC, bootstrap=50)
    edema = result["findings"]["Edema"]
    assert (edema["support"], edema["predicted"], edema["true_positives"]) == (3, 2, 1)
    assert edema["accuracy"]["value"] == 1 / 4
    assert edema["sensitivity"]["value"] == pytest.approx(1 / 3)
    assert edema["precision"]["value"] == 1 / 2
    assert edema["f1"]["value"] == pytest.approx(2 / 5)
    assert edema["specificity"]["value"] == 0
    assert result["exact_match"]["value"] == 1 / 4
    assert result["unparsable"] == 1


def test_unparsable_answer_is_wrong_for_every_finding():
    truth = [("Edema",)] * 4
    silent = c.classification(truth, [None] * 4, findings=ABC, bootstrap=10)
    nothing = c.classification(truth, [()] * 4, findings=ABC, bootstrap=10)
    assert silent["findings"]["Pneumonia"]["accuracy"]["value"] == 0
    assert nothing["findings"]["Pneumonia"]["accuracy"]["value"] == 1
    assert (silent["unparsable"], nothing["unparsable"]) == (4, 0)


def test_classification_agrees_with_sklearn():
    from sklearn import metrics

    truth = random_labels(1, 300, (0.5, 0.3, 0.1, 0.2))
    predicted = random_labels(2, 300, (0.6, 0.2, 0.1, 0.3))
    result = c.classification(truth, predicted, bootstrap=20)
    y, z = matrix(truth), matrix(predicted)
    for column, name in enumerate(LABEL_NAMES[:4]):
        found = {m: result["findings"][name][m]["value"] for m in c.METRICS}
        assert found["accuracy"] == pytest.approx(
            metrics.accuracy_score(y[:, column], z[:, column])
        )
        assert found["sensitivity"] == pytest.approx(
            metrics.recall_score(y[:, column], z[:, column])
        )
        assert found["precision"] == pytest.approx(
            metrics.precision_score(y[:, column], z[:, column])
        )
        assert found["f1"] == pytest.approx(metrics.f1_score(y[:, column], z[:, column]), abs=1e-12)
    occurring = y[:, :4], z[:, :4]
    for ours, theirs in (("sensitivity", "recall"), ("precision", "precision"), ("f1", "f1")):
        score = getattr(metrics, f"{theirs}_score")
        macro = score(*occurring, average="macro", zero_division=0)
        assert result["macro"][ours]["value"] == pytest.approx(macro, abs=1e-12)
        assert result["micro"][ours]["value"] == pytest.approx(score(y, z, average="micro"))
    assert result["exact_match"]["value"] == pytest.approx(metrics.accuracy_score(y, z))


def test_bootstrap_is_seeded_and_as_wide_as_theory_says():
    truth = [("Edema",)] * 400
    predicted = [("Edema",)] * 300 + [("Pneumonia",)] * 100
    one, two = (c.classification(truth, predicted, bootstrap=2000, seed=3) for _ in range(2))
    assert one == two
    low, high = one["findings"]["Edema"]["accuracy"]["interval"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.01)
    assert high == pytest.approx(0.75 + half, abs=0.01)
    assert c.classification(truth, predicted, bootstrap=2000, seed=4) != one


def test_difference_is_paired():
    truth = random_labels(5, 200, (0.5, 0.5, 0.5))
    worse = [tuple(n for n in LABEL_NAMES[:3] if n not in row) for row in truth]
    same = c.difference(truth, worse, worse)
    assert same["accuracy"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert c.difference(truth, worse, truth)["accuracy"]["value"] == pytest.approx(1.0)
    found = c.difference(truth, worse, truth)
    assert found["micro_f1"]["value"] == pytest.approx(1.0)
    assert found["findings"][LABEL_NAMES[0]]["accuracy"] == {"value": 1.0, "interval": [1.0, 1.0]}
    half = [
        row if i % 2 else names for i, (row, names) in enumerate(zip(truth, worse, strict=True))
    ]
    mixed = c.difference(truth, half, truth)["findings"][LABEL_NAMES[1]]["accuracy"]
    assert mixed["value"] == pytest.approx(0.5) and mixed["interval"][0] > 0.4


def test_majority_guess_has_the_labels_of_most_studies():
    training = [("Edema", "Pneumonia"), ("Edema",), ("Pneumonia", "Edema"), ("Atelectasis",)]
    assert c.majority_guess(training) == ("Edema",)
    with pytest.raises(UsageError, match="no training study"):
        c.majority_guess([])


def test_auc_and_its_resamples_agree_with_sklearn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth = random_labels(7, 120, (0.5, 0.2))
    scores = np.round(matrix(truth) * 0.7 + rng.random((120, 15)), 1)  # rounded: many ties
    result = c.auc(truth, scores, bootstrap=30, seed=1)
    expected = [roc_auc_score(matrix(truth)[:, i], scores[:, i]) for i in (0, 1)]
    assert result["findings"]["Atelectasis"]["value"] == expected[0]
    assert result["findings"]["Fracture"] == {"value": None, "interval": None}
    assert result["macro"]["value"] == pytest.approx(np.mean(expected))
    weights = study_weights(120, 30, 1)
    target = matrix(truth)[:, 0]
    ours = c._weighted_auc(target, scores[:, 0], weights)
    theirs = [roc_auc_score(target, scores[:, 0], sample_weight=w) for w in weights]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([], [], "split is empty"),
        ([("Edema",)], [], "1 study, but 0 answers"),
        ([("Gout",)], [("Edema",)], "'Gout'"),
        ([("Edema",)], [("Gout",)], "'Gout'"),
    ],
)
def test_bad_input_of_classification_is_named(truth, predicted, message):
    with pytest.raises(UsageError, match=message):
        c.classification(truth, predicted)


def test_auc_refuses_wrong_shapes_and_nan():
    with pytest.raises(UsageError, match="studies x findings"):
        c.auc([("Edema",)], np.zeros((1, 3)))
    with pytest.raises(UsageError, match="NaN"):
        c.auc([("Edema",)], np.full((1, 15), np.nan))


def test_preference_figures_equal_hand_computation():
    result = summarize_preference([-1, -5, -3], [-4, -4, -3], [-2, -2, -3], [-3, -3, -3], beta=0.5)
    # rewards: chosen .5, -1.5, 0; rejected -.5, -.5, 0: one won, one lost, one tie (not won)
    assert result["accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["margin"]["value"] == pytest.approx((1.0 - 1.0 + 0.0) / 3)
    assert result["policy_accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["chosen_reward"] == pytest.approx(-1 / 3)
    assert result["pairs"] == 3


def test_reference_accuracy_uses_its_own_log_probs():
    scored = {
        "policy_chosen": [-1.0, -5.0, -3.0], "policy_rejected": [-4.0, -4.0, -4.0],
        "reference_chosen": [-3.0, -2.0, -3.0], "reference_rejected": [-2.0, -3.0, -3.0],
        "groups": ["a", "b", "c"], "sources": ["thinking", "thinking", "perception"],
    }  # fmt: skip
    policy, reference = summarize_both_models(scored, beta=0.5)
    assert policy == summarize_preference(**scored, beta=0.5)
    assert reference.keys() == {"pairs", "policy_accuracy", "sources"}
    assert reference["policy_accuracy"]["value"] == pytest.approx(1 / 3)
    assert reference["sources"]["thinking"] == {
        "pairs": 2, "policy_accuracy": {"value": 0.5, "interval": [0.0, 1.0]}}  # fmt: skip
    assert reference["sources"]["perception"]["policy_accuracy"]["value"] == 0.0, "a tie"


def test_policy_equal_to_reference_has_no_reward():
    logps = [-10.0, -12.0]
    result = summarize_preference(logps, logps, logps, logps, beta=0.1, groups=["a", "a"])
    assert result["accuracy"] == {"value": 0.0, "interval": [0.0, pytest.approx(0.975)]}
    assert result["margin"] == {"value": 0.0, "interval": None}  # one study


def test_interval_of_few_pairs_is_wide():
    won, lost = [-10.0] * 4, [-12.0] * 4
    result = summarize_preference(won, lost, lost, won, beta=0.5)
    # Clopper and Pearson 1934: for 4 of 4, the 95 % interval begins at 39.8 %.
    assert result["accuracy"] == {"value": 1.0, "interval": [pytest.approx(0.3976, abs=1e-4), 1.0]}
    assert result["policy_accuracy"]["interval"] == result["accuracy"]["interval"]
    assert result["beta"] == 0.5


def test_preference_refuses_bad_log_probs():
    with pytest.raises(UsageError, match="unequal"):
        summarize_preference([1.0], [1.0, 2.0], [1.0], [1.0], beta=0.1)
    with pytest.raises(UsageError, match="NaN"):
        summarize_preference([math.nan], [1.0], [1.0], [1.0], beta=0.1)
    with pytest.raises(UsageError, match="no held-out pair"):
        summarize_preference([], [], [], [], beta=0.1)


REFERENCES = [
    "LABEL_NAMES: The heart is mildly enlarged. No pneumothorax is seen.",
    "The lungs are clear. There is no pleural effusion.",
]
CANDIDATES = [
    "The heart is enlarged. No pneumothorax or effusion is seen.",
    "The lungs are clear, there is no effusion.",
]


def test_bleu_agrees_with_nltk():
    from nltk.translate.bleu_score import corpus_bleu

    result = text.text_metrics(REFERENCES, CANDIDATES)
    refs = [[text.split_words(r)] for r in REFERENCES]
    given = [text.split_words(r) for r in CANDIDATES]
    for n in range(1, 5):
        expected = corpus_bleu(refs, given, weights=tuple([1 / n] * n))
        assert result[f"bleu_{n}"] == pytest.approx(expected, abs=1e-12)
    assert result["bleu_1"] > result["bleu_4"] > 0


def test_text_metrics_agree_with_the_coco_package():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    refs = {i: [" ".join(text.split_words(r))] for i, r in enumerate(REFERENCES)}
    given = {i: [" ".join(text.split_words(r))] for i, r in enumerate(CANDIDATES)}
    result = text.text_metrics(REFERENCES, CANDIDATES)
    scores, _ = Bleu(4).compute_score(refs, given, verbose=0)
    for n, score in enumerate(scores, start=1):
        assert result[f"bleu_{n}"] == pytest.approx(score, abs=1e-9)
    assert result["rouge_l"] == pytest.approx(Rouge().compute_score(refs, given)[0], abs=1e-12)
    score, own = Cider().compute_score(refs, given)
    assert result["cider"] == pytest.approx(score, abs=1e-9)
    assert min(own) <= result["intervals"]["cider"][0] <= result["cider"]
    if "meteor" in result["missing"]:
        return
    assert result["meteor"] == pytest.approx(Meteor().compute_score(refs, given)[0], abs=1e-9)
    low, high = result["intervals"]["meteor"]
    assert low <= result["meteor"] <= high


def test_rouge_l_equals_hand_computation():
    # longest common subsequence "a c d": 3 of 4 and of 5 words
    precision, recall = 3 / 5, 3 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert text.rouge_l(["a", "b", "c", "d"], ["a", "x", "c", "y", "d"]) == pytest.approx(expected)
    assert text.rouge_l(["a", "b"], ["c"]) == 0
    assert text.rouge_l(["a", "b"], []) == 0


def test_common_subsequence_agrees_with_the_table():
    rng = np.random.default_rng(0)
    for _ in range(40):
        first, second = (list(rng.integers(0, 6, rng.integers(0, 90)).astype(str)) for _ in "ab")
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                longer = max(table[i, j + 1], table[i + 1, j])
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else longer
        assert text.common_subsequence(first, second) == table[-1, -1]


def test_text_intervals_equal_resampled_studies(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)  # METEOR's program is slow to start
    refs = [
        *REFERENCES,
        "Mild pulmonary edema.",
        "No pneumothorax. Stable cardiomegaly.",
        "Ok.",
    ]
    given = [*CANDIDATES, "Pulmonary edema is mild.", "Cardiomegaly.", ""]
    found = text.text_metrics(refs, given, bootstrap=40, seed=5)
    weights = study_weights(len(refs), 40, 5)
    draws = [[i for i, n in enumerate(row) for _ in range(int(n))] for row in weights]
    redrawn = [text.text_metrics([refs[i] for i in draw], [given[i] for i in draw], bootstrap=1)
               for draw in draws]  # fmt: skip
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "label_f1"):
        values = [one[name] for one in redrawn if one[name] is not None]
        expected = np.quantile(values, [0.025, 0.975])
        assert found["intervals"][name] == pytest.approx(expected, abs=1e-12), name
        assert min(values) <= found[name] <= max(values)


def test_bleu_without_a_match_is_zero():
    assert text.bleu([["a", "b"]], [["c", "d"]]) == [0.0, 0.0, 0.0, 0.0]
    found = text.bleu([list("abcdefgh")], [list("abcxdefy")])
    assert found[2] > 0.3 and found[3] == 0.0


def test_equal_texts_score_one():
    result = text.text_metrics(REFERENCES, REFERENCES)
    assert result["bleu_4"] == pytest.approx(1.0)
    assert result["rouge_l"] == pytest.approx(1.0)


def test_label_f1_and_missing_metrics(monkeypatch):
    report = "There is pulmonary edema. Cardiomegaly. No pneumothorax."
    assert text.text_metrics([report], ["Cardiomegaly."])["label_f1"] == pytest.approx(2 / (2 + 1))
    silent = text.text_metrics(["Lines."], ["Lines."])
    assert silent["label_f1"] is None and silent["intervals"]["label_f1"] is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = text.text_metrics([report], [report])
    assert "meteor" in found["missing"] and "meteor" not in found
    assert found["label_f1"] == 1.0
