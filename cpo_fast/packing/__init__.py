"""Preference -> PackedBatch: tokenise, plan the optimiser steps of an epoch, build the packs."""

from cpo_fast.packing.collate import collate
from cpo_fast.packing.encode import encode, encode_all, image_token_id
from cpo_fast.packing.plan import Pack, Step, packing_efficiency, plan_epoch

__all__ = [
    "Pack",
    "Step",
    "collate",
    "encode",
    "encode_all",
    "image_token_id",
    "packing_efficiency",
    "plan_epoch",
]
