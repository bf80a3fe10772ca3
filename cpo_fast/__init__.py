"""cpo_fast: counterfactual preference optimisation, fast and packed.

The loss op is public and stands alone; its names are loaded on first use, so that the stages which
need no torch (data, concepts, counterfactual) start without it. The stages of the pipeline are the
subpackages, in the order of the pipeline: data, concepts, counterfactual, packing, model, loss,
training, evaluation, report, run; `python -m cpo_fast.train` wires them.
"""

from typing import TYPE_CHECKING, Any

from cpo_fast.version import __version__

if TYPE_CHECKING:
    from cpo_fast.loss import (
        CPOLoss,
        CPOOutput,
        available_impls,
        cpo_loss,
        from_padded,
        linear_logprobs,
    )

__all__ = [
    "CPOLoss",
    "CPOOutput",
    "__version__",
    "available_impls",
    "cpo_loss",
    "from_padded",
    "linear_logprobs",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cpo_fast import loss

        return getattr(loss, name)
    raise AttributeError(f"module 'cpo_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
