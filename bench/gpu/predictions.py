"""Times of the loss op on a GPU, predicted by arithmetic before any measurement.

Measurements are compared with them: a miss in either direction shows an error in the model. All are
for T = 8192 tokens in bfloat16. Rates are published figures for such cards; the check measures the
ceilings of the actual card.

    GEMM        2 T V D FLOP at 790 TFLOP/s: 11.3 ms for the 7B head
    floor       3 GEMMs for a frozen head with an on-line reference, 4 for a trained one
    row pass    2 T V bytes per read or write of the logits (2.5 GB at V = 152,064) at the rate of a
                copy. The reference is read once, the policy read and written; its second read hits
                the L2. 7.5 GB: 2.5 ms at 3.0 TB/s, 1.7 ms at 4.3 TB/s
    issue       instructions of the row kernel per 16 logits, 32 lanes, 4 per clock on each of 132
                multiprocessors. Lean: 196 for the policy and 104 for the reference, 0.8 ms, less
                than the memory time. Masked: 604 and 285, at least 2.3 ms, 2.6 to 3.3 in practice
    rest        backward row scale (0.05 ms), launches, last wave of rows: 0.1 to 0.4 ms
"""

from __future__ import annotations

from typing import NamedTuple

from bench.gpu.cases import FROZEN, HEADS, LSE_ONLY, TRAINED
from bench.gpu.cases import TOKENS as T
from bench.gpu.sections import make_table

GEMM_RATE = 790e12
CLOCK, MULTIPROCESSORS = 1.755e9, 132
REST = (0.1, 0.4)  # ms
# The epilogue of the WGMMA kernel and the cp.async loop of the Triton log-sum-exp leave the tensor
# cores idle part of the time. For D = 3584 only: an epilogue's share is larger at smaller D.
WGMMA_RATES = (660e12, 750e12)
TRITON_LSE_RATES = (600e12, 660e12)
MASKED_INSTRUCTIONS = {"reference": 285, "policy": 285 + 319}  # per 16 logits
ISSUE_EFFICIENCY = (0.7, 0.9)


class Span(NamedTuple):
    """A range of milliseconds."""

    low: float
    high: float

    def __add__(self, other: Span) -> Span:  # type: ignore[override]
        return Span(self.low + other.low, self.high + other.high)


def get_copy_rate(device_name: str) -> float | None:
    """Bytes read plus bytes written per second; None for a card without predictions."""
    rates = {"H100": 3.0e12, "H200": 4.3e12}
    return next((rate for name, rate in rates.items() if name in device_name), None)


def predict_gemms(
    model: str, count: int, rates: tuple[float, float] = (GEMM_RATE, GEMM_RATE)
) -> Span:
    D, V = HEADS[model]
    work = count * 2 * T * V * D
    return Span(1e3 * work / max(rates), 1e3 * work / min(rates))


def predict_row_pass(model: str, passes: int, rate: float) -> Span:
    """Time to read or write all logits `passes` times at the rate of a copy."""
    milliseconds = 1e3 * passes * 2 * T * HEADS[model][1] / rate
    return Span(milliseconds, milliseconds)


def predict_issue(model: str, instructions: int) -> Span:
    """Time of the row kernel if it is bound by instruction issue."""
    warps = T * HEADS[model][1] / 16 / 32 * instructions
    at_best = 1e3 * warps / (4 * MULTIPROCESSORS * CLOCK)
    return Span(at_best / max(ISSUE_EFFICIENCY), at_best / min(ISSUE_EFFICIENCY))


def predict(device_name: str, provider: str, case: str, model: str) -> Span | None:
    """Milliseconds of forward and backward (the forward for log-probs alone) at T = 8192; None for
    a card, provider, case or model without a prediction."""
    rate = get_copy_rate(device_name)
    products = {FROZEN: 3, TRAINED: 4, LSE_ONLY: 1}.get(case)
    if rate is None or products is None or model not in HEADS:
        return None
    if provider == "floor":
        return predict_gemms(model, products)
    rest = Span(*REST)
    if provider in ("triton lean", "cuda rows"):
        passes = 1 if case == LSE_ONLY else 3
        return predict_gemms(model, products) + predict_row_pass(model, passes, rate) + rest
    if provider == "triton masked":
        instructions = MASKED_INSTRUCTIONS["reference"]
        if case != LSE_ONLY:
            instructions += MASKED_INSTRUCTIONS["policy"]
        slots = predict_issue(model, instructions)
        memory = predict_row_pass(model, 1 if case == LSE_ONLY else 3, rate)
        longer = Span(*map(max, zip(slots, memory, strict=True)))
        return predict_gemms(model, products) + longer + rest
    if model != "7B":
        return None
    if provider == "cuda fused":
        # WGMMA kernels for the reference's log-sum-exp and the policy's E, vendor GEMMs otherwise.
        own = 1 if case == LSE_ONLY else 2
        return predict_gemms(model, own, WGMMA_RATES) + predict_gemms(model, products - own) + rest
    if provider == "triton lse" and case == LSE_ONLY:
        return predict_gemms(model, 1, TRITON_LSE_RATES) + rest
    return None


SHOWN = (
    ("7B", FROZEN, ("triton lean", "cuda rows", "triton masked", "cuda fused")),
    ("7B", TRAINED, ("triton lean", "cuda fused")),
    ("7B", LSE_ONLY, ("triton lean", "cuda fused", "triton lse")),
    ("3B", FROZEN, ("triton lean",)),
    ("0.5B", FROZEN, ("triton lean",)),
)
CARDS = ("H100", "H200")


def make_predictions_table() -> str:
    """The Markdown table of docs/gpu.md: milliseconds, and their ratio to the floor."""
    rows = []
    for model, case, providers in SHOWN:
        for provider in ("floor", *providers):
            cells = []
            for card in CARDS:
                span, floor = (predict(card, p, case, model) for p in (provider, "floor"))
                assert span is not None and floor is not None
                cell = f"{span.low:.1f}"
                if provider != "floor":
                    ratios = f"{span.low / floor.low:.2f} to {span.high / floor.low:.2f}"
                    cell = f"{span.low:.1f} to {span.high:.1f} ({ratios})"
                cells.append(cell)
            rows.append([f"{model}, {case}", provider, *cells])
    header = ["head, case", "provider", *(f"{card}, ms (x floor)" for card in CARDS)]
    return make_table(header, rows)


if __name__ == "__main__":
    print(make_predictions_table())
