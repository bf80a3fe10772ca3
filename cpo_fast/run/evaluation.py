"""The evaluation of a run: its models on the test split, rewards on held-out pairs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.data.labels import diagnosis
from cpo_fast.errors import DataError
from cpo_fast.evaluation.cohort import Cohort
from cpo_fast.evaluation.pairs import compare_pairs
from cpo_fast.evaluation.run import evaluate
from cpo_fast.evaluation.suites import Options
from cpo_fast.evaluation.summary import choose_examples, write_examples
from cpo_fast.model.packed import PackedModel
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Corpus, Texts
from cpo_fast.run.samples import Samples
from cpo_fast.run.stages import find_sft_result, find_stage_result, load_reference
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import PreferenceGroup


def evaluate_run(run: RunContext, corpus: Corpus, texts: Texts, samples: Samples) -> dict[str, Any]:
    """Evaluate the untrained, the SFT and the CPO model; returns `evaluation` of summary.json.

    Every model is loaded from its files, as a user would load it. A study whose image fails is left
    out for all models; DataError when none is left. Writes evaluation.json.
    """
    args, checkpoint = run.args, run.checkpoint
    models = find_models(run)
    cohort = _build_cohort(run, corpus, samples)
    pairs_of = "test" if samples.cpo["test"] else "validate"
    held_out = samples.cpo[pairs_of][: args.max_eval_samples]

    def compare(model: Any) -> dict[str, dict[str, Any]]:
        figures = compare_held_out(run, model, held_out, names=("cpo", list(models)[-2]))
        return {name: each | {"split": pairs_of} for name, each in figures.items()}

    try:
        result = evaluate(
            {
                name: partial(checkpoint.load, dtype=run.dtype, path=path)
                for name, path in models.items()
            },
            checkpoint,
            cohort,
            Options(
                max_new_tokens=args.max_new_tokens,
                batch_size=args.eval_batch_size,
                seed=args.seed,
            ),
            {"cpo": compare} if "cpo" in models and held_out else {},
        )
    finally:
        run.folder.reject_unreadable("evaluation", cohort.rejected)
    if not cohort.studies:
        return result.figures or {"preference": {}}
    examples = choose_examples(
        cohort.studies,
        result.answers,
        [one for one in texts.counterfactuals if one.kind == "thinking"],
        count=args.num_examples,
        uncertain=args.uncertain_labels,
    )
    write_examples(run.folder.path, examples)
    return result.figures


def find_models(run: RunContext) -> dict[str, Path]:
    """The run's models by name, in the order in which they were trained."""
    base = run.checkpoint.path
    models = {"sft" if run.args.sft_checkpoint else "untrained": base}
    if (sft := find_sft_result(run)) != base:
        models["sft"] = sft
    if cpo := find_stage_result(run, run.folder.path / "cpo"):
        models["cpo"] = cpo
    return models


def _build_cohort(run: RunContext, corpus: Corpus, samples: Samples) -> Cohort:
    """The tokenised studies of the test split, up to `max_eval_samples`."""
    tested = {group.id: group for group in samples.sft["test"]}
    studies = [study for study in corpus.studies["test"] if study.study_id in tested]
    uncertain = run.args.uncertain_labels
    cohort = Cohort(stage="evaluate")
    for study in studies[: run.args.max_eval_samples]:
        names = diagnosis(study.labels, uncertain=uncertain)
        cohort.add(study, tested[study.study_id].prompt, names)
    if cohort.studies:
        train = corpus.studies["train"]
        cohort.training_truth = [diagnosis(one.labels, uncertain=uncertain) for one in train]
    return cohort


def compare_held_out(
    run: RunContext, model: Any, groups: list[PreferenceGroup], *, names: tuple[str, str]
) -> dict[str, dict[str, Any]]:
    """{name: preferences of the CPO model, and of the model that it started from}.

    A group whose image fails is left out; DataError when none is left.
    """
    args = run.args
    packed = PackedModel(model.eval(), attention=args.attn_implementation)
    reference = None if args.use_peft else load_reference(run, find_sft_result(run))
    figures, failed = compare_pairs(
        CPOObjective(packed, reference, impl=args.loss_impl),
        run.checkpoint,
        groups,
        names=names,
        beta=args.beta,
        packing_length=args.packing_length,
        seed=args.seed,
    )
    run.folder.reject_unreadable("rewards", failed)
    if not figures:
        raise DataError(
            f"evaluation: no held-out pair of {counted(len(groups), 'sample')} could be read"
        )
    return figures
