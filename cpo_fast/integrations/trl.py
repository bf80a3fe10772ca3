"""`CPODPOTrainer`: trl's DPOTrainer with log-probs and loss from cpo_fast.

It overrides the two methods that score a batch, `_compute_loss` and `compute_ref_log_probs`. Data,
collation, precomputed references, adapters, evaluation, logging, checkpoints and metric names are
trl's.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.integrations.token_statistics import TokenStatistics, token_statistics
from cpo_fast.loss import CPOOutput, cpo_loss, linear_logprobs
from cpo_fast.loss.losses import FORMULAS
from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.loss.segments import segment_sums

TRL = (1, 16), (1, 17)
"""Supported versions of trl: at least the first, below the second."""

LOSSES = {
    "sigmoid": ("sigmoid", False),
    "sigmoid_norm": ("sigmoid", True),
    **{
        name: (name, LOSS_TYPES[name].averages)
        for name in ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
                     "apo_zero", "apo_down")
    },
}  # fmt: skip
"""trl's loss type -> (name in cpo_fast, whether log-ratios are averaged over tokens)."""

SMOOTHED = ("robust", "exo_pair")
"""The losses for which trl uses `label_smoothing`; for others it is ignored."""


def check_version(version: str) -> None:
    """ImportError for an unsupported version of trl."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not TRL[0] <= found < TRL[1]:
        low, high = (".".join(map(str, bound)) for bound in TRL)
        raise ImportError(
            f"cpo_fast.integrations.trl works with trl >= {low}, < {high}; {version} is installed: "
            f"pip install 'trl>={low},<{high}'"
        )


try:
    check_version(metadata.version("trl"))
except metadata.PackageNotFoundError as error:
    raise ImportError("cpo_fast.integrations.trl needs trl: pip install 'trl>=1.16'") from error

from accelerate.utils import is_peft_model  # noqa: E402
from trl import DPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402


class CPODPOTrainer(DPOTrainer):
    """trl's DPOTrainer with `cpo_fast.cpo_loss`, which scores the response tokens only.

    Takes the arguments of DPOTrainer and two keywords. `token_metrics` False omits the metrics
    `entropy`, `mean_token_accuracy` and `logits/*`, which need an additional product with the
    output head. `impl` is an implementation of the op (default: the best on the device).

    Raises ValueError for unsupported options of DPOConfig: other loss types, label smoothing with a
    loss for which trl ignores it, `ld_alpha`, f-divergences, `use_weighting`, a router's auxiliary
    loss, and sharded models (FSDP, DeepSpeed ZeRO-3).
    """

    def __init__(
        self, *args: Any, token_metrics: bool = True, impl: str | None = None, **kwargs: Any
    ) -> None:
        self.token_metrics, self.impl = token_metrics, impl
        self._head_is_plain = False  # checked on the first batch
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()

    def _refuse_unsupported(self) -> None:
        advice = "use trl's own DPOTrainer for that"
        unknown = [name for name in self.loss_types if name not in LOSSES]
        if unknown:
            raise ValueError(
                f"loss_type {', '.join(unknown)}: cpo_fast has {', '.join(LOSSES)}; {advice}"
            )
        ignoring = [name for name in self.loss_types if name not in SMOOTHED]
        if self.label_smoothing and ignoring:
            raise ValueError(
                f"label_smoothing {self.label_smoothing} with loss_type {', '.join(ignoring)}: trl "
                f"uses it for {' and '.join(SMOOTHED)} only; set it to 0"
            )
        if "robust" in self.loss_types and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must be >= 0 and < 0.5 for robust, got {self.label_smoothing}"
            )
        wrong = {
            "ld_alpha": self.ld_alpha is not None,
            f"f_divergence_type {self.f_divergence_type}": self.f_divergence_type != "reverse_kl",
            "use_weighting": self.use_weighting,
            "the router's auxiliary loss (router_aux_loss_coef)": self.aux_loss_enabled,
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed ZeRO-3": self._zero_stage() == 3,
        }
        for name, given in wrong.items():
            if given:
                raise ValueError(f"{name} is not computed by CPODPOTrainer; {advice}")

    def _zero_stage(self) -> int:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin.zero_stage if self.is_deepspeed_enabled and plugin is not None else 0

    # --- hidden states ---------------------------------------------------------------------------

    def _unwrapped(self, model: Any) -> Any:
        """The transformers model inside accelerate's and peft's wrappers."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _states(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [R, D] that predict the response tokens, and the head's weight and bias.

        The model is called through its wrappers, for DDP and autocast; a hook on the trunk records
        the states, and the head computes one position per row, for the check.
        """
        whole = self._unwrapped(model)
        if "logits_to_keep" not in inspect.signature(type(whole).forward).parameters:
            raise ValueError(
                f"{type(whole).__name__}.forward has no logits_to_keep: it computes all logits; "
                "use trl's own DPOTrainer"
            )
        given = {k: v for k, v in inputs.items() if k not in _NOT_THE_MODELS}
        with _last_states(whole.base_model) as seen:
            logits = model(**given, use_cache=False, logits_to_keep=1).logits
        head = whole.get_output_embeddings()
        if not self._head_is_plain:
            self._check_head(seen[0][:, -1], logits[:, -1], head, _softcap(whole))
            self._head_is_plain = True
        wanted = inputs["completion_mask"][:, 1:].bool()
        # Virtual tokens of prompt tuning come first; the last positions belong to the tokens.
        states = seen[0][:, -inputs["input_ids"].shape[1] :][:, :-1]
        return states[wanted.to(states.device)], head.weight, head.bias

    def _check_head(self, states: Tensor, logits: Tensor, head: Any, softcap: float | None) -> None:
        """ValueError if the logits are not a linear layer and a softcap of the hidden states."""
        with torch.no_grad(), self.accelerator.autocast():
            ours = F.linear(states, head.weight, head.bias).float()
        ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
        theirs = logits.detach().float()
        if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
            raise ValueError(
                "the model's logits are not its output layer times its last hidden states (scaled "
                "logits, for example): cpo_fast would score them wrongly; use trl's own DPOTrainer"
            )

    def _reference_states(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `_states`, without gradients, of `ref_model` or of the model with its adapters off."""
        policy: Any = self.model
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(
                policy, cast(Any, self.args.gradient_checkpointing_kwargs)
            ),
            self._adapters_off(),
        ):
            return self._states(model, inputs)

    def _adapters_off(self) -> contextlib.AbstractContextManager[Any]:
        if self.ref_model is not None or not is_peft_model(self.model):
            return contextlib.nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, "ref" if "ref" in model.peft_config else None)

    # --- called by trl
    # -----------------------------------------------------------------------------

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed log-probs of the reference, chosen [B] and rejected [B], of a padded batch."""
        hidden, weight, bias = self._reference_states(model, inputs)
        labels, segments = _labels(inputs)
        softcap = _softcap(self._unwrapped(model))
        with torch.no_grad(), self.accelerator.autocast():
            tokens = linear_logprobs(
                hidden, weight, labels, bias=bias, softcap=softcap, impl=self.impl
            )
        sums = segment_sums(tokens, segments, len(inputs["input_ids"]))
        chosen, rejected = sums.float().chunk(2)
        return chosen, rejected

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        hidden, weight, bias = self._states(model, inputs)
        reference: dict[str, Any] = {}
        if self.precompute_ref_logps:
            both = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            reference["ref_logps"] = torch.cat(both).float()
        else:
            compared = self.ref_model or self.model
            ref_hidden, ref_weight, ref_bias = self._reference_states(compared, inputs)
            reference["ref_hidden"] = ref_hidden
            if ref_weight is not weight:
                reference |= {"ref_weight": ref_weight, "ref_bias": ref_bias}
        labels, segments = _labels(inputs)
        softcap = _softcap(self._unwrapped(model))
        sides = torch.arange(len(inputs["input_ids"]), device=labels.device)
        with self.accelerator.autocast():
            out = cpo_loss(
                hidden,
                weight,
                labels,
                segments,
                torch.stack(sides.chunk(2), 1),
                bias=bias,
                softcap=softcap,
                beta=self.beta,
                num_segments=len(sides),
                impl=self.impl,
                **reference,
            )
        lengths = torch.bincount(segments, minlength=len(sides))
        loss = self._loss(out, lengths)
        self._record(inputs, out)
        if self.token_metrics:
            with self.accelerator.autocast():
                found = token_statistics(hidden, weight, labels, bias=bias, softcap=softcap)
            self._record_tokens(found, segments < len(sides) // 2)
        if return_outputs:  # the logits for compute_metrics
            given = {k: v for k, v in inputs.items() if k not in _NOT_THE_MODELS}
            with torch.no_grad():
                return loss, model(**given, use_cache=False)
        return loss

    def _loss(self, out: CPOOutput, lengths: Tensor) -> Tensor:
        """The weighted sum of the losses in `loss_type`, each a mean over the pairs."""
        # Log-ratios exact up to one rounding of the rewards, with the gradient of the log-probs.
        rewards = torch.cat((out.chosen_rewards, out.rejected_rewards))
        ratios = rewards / self.beta + (out.logps - out.logps.detach())
        loss = ratios.new_zeros(())
        for name, share in zip(self.loss_types, self.loss_weights, strict=True):
            own, averages = LOSSES[name]
            compared = ratios / lengths.clamp(min=1) if averages else ratios
            chosen, rejected = compared.chunk(2)
            losses = FORMULAS[own](chosen, rejected, self.beta, self.label_smoothing)
            loss = loss + share * losses.mean()
        return loss

    # --- metrics, averaged as in trl
    # ---------------------------------------------------------------

    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _record(self, inputs: dict[str, Any], out: CPOOutput) -> None:
        mode = self._mode()
        if mode == "train":
            count = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += count // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = out.chosen_rewards, out.rejected_rewards
        logps = out.logps.detach().chunk(2)
        for name, values in {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())

    def _record_tokens(self, found: TokenStatistics, chosen: Tensor) -> None:
        """`chosen` [R] bool: whether a row belongs to a chosen response."""
        mode = self._mode()
        every = torch.ones_like(chosen)
        for name, values, where in (
            ("entropy", found.entropy, every),
            ("logits/chosen", found.mean_logit, chosen),
            ("logits/rejected", found.mean_logit, ~chosen),
            ("mean_token_accuracy", found.is_top1.float(), chosen),
        ):
            sums = torch.stack((values[where].sum(), where.sum().float()))[None]
            total, count = self.accelerator.gather_for_metrics(sums).sum(0).tolist()
            self._metrics[mode][name].append(total / count if count else 0.0)


_NOT_THE_MODELS = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def _labels(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The response tokens [R] of a padded batch in row order, and the row [R] of each."""
    wanted = inputs["completion_mask"][:, 1:].bool()
    return inputs["input_ids"][:, 1:][wanted], wanted.nonzero()[:, 0]


def _softcap(model: Any) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@contextlib.contextmanager
def _last_states(trunk: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Record the last hidden states of every call of `trunk` in the block."""
    seen: list[Tensor] = []
    hook = trunk.register_forward_hook(lambda _, given, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()
