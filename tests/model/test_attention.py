"""Every attention implementation equals separate, unpacked forwards of the same model."""

from __future__ import annotations

import functools
import shutil
import sys
import types

import pytest
import torch

from cpo_fast.errors import UsageError
from cpo_fast.model.attention import (
    FlexLayout,
    RepeatedRows,
    _flex_attention,
    dense_mask,
    varlen_kernel,
)
from cpo_fast.model.build import add_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.packed_oracle import (
    CASES,
    adapted,
    assert_same_grads,
    dpo_loss,
    groups_of,
    pack_of,
    packed_logps,
    separate_logps,
    trainable_grads,
)
from cpo_fast.testing.samples import mixed, preference, vision_language_model


def attend_each_sequence(q, k, v, query_ends, key_ends, longest_q, longest_k, *, scale, causal):
    """Plain torch in place of the variable-length CUDA kernels, with grouped heads."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends[-1] == len(q) and key_ends[-1] == len(k) == len(v)
    assert longest_q == query_ends.diff().max() and longest_k == key_ends.diff().max()
    out = []
    for i in range(len(query_ends) - 1):
        rows, columns = (slice(ends[i], ends[i + 1]) for ends in (query_ends, key_ends))
        heads = [x.transpose(0, 1) for x in (q[rows], k[columns], v[columns])]
        heads[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in heads[1:]]
        n, m = heads[0].shape[1], heads[1].shape[1]
        seen = torch.ones(n, m, dtype=torch.bool)
        seen = seen.tril(m - n) if causal else seen  # aligned at the lower right
        scores = (heads[0] @ heads[1].transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(out)


def torch_varlen(*tensors, scale=None, window_size=(-1, -1), enable_gqa=False):
    """With the signature of torch.nn.attention.varlen.varlen_attn."""
    q, k = tensors[:2]
    assert enable_gqa or q.shape[1] == k.shape[1]  # as torch requires
    return torch_2_11_varlen(*tensors, scale=scale, window_size=window_size)


def torch_2_11_varlen(*tensors, scale=None, window_size=(-1, -1)):
    """With the signature of torch 2.11, which groups heads without a keyword."""
    assert window_size in ((-1, 0), (-1, -1))
    return attend_each_sequence(*tensors, scale=scale, causal=window_size == (-1, 0))


def flash_attn_varlen(*tensors, dropout_p=0.0, softmax_scale=None, causal=False):
    """With the signature of flash_attn.flash_attn_varlen_func."""
    assert not dropout_p
    return attend_each_sequence(*tensors, scale=softmax_scale, causal=causal)


@pytest.fixture(autouse=True)
def cuda_attention_on_cpu(request, monkeypatch):
    """Run tests of "varlen", "flash-attn" and "flex" on the CPU, without their kernels."""
    monkeypatch.setattr("cpo_fast.model.attention.SHORTEST_FLEX", 64)
    name = request.node.name
    if "flex" in name:
        monkeypatch.setattr("cpo_fast.model.packed._check_flex", lambda *_: None)
        # The dense form has a backward on the CPU, but this check refuses it.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    if "varlen" in name or "flash-attn" in name:
        from_torch = torch_2_11_varlen if "first" in name else torch_varlen
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", from_torch)
        if "flash-attn" in name:
            monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # missing
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_attn_varlen
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr("cpo_fast.model.packed._check_varlen", lambda *_: None)
        varlen_kernel.cache_clear()
        request.addfinalizer(varlen_kernel.cache_clear)


IMPLEMENTATIONS = ["gathered", "sdpa", "varlen", "first-varlen", "flash-attn", "flex"]


def pack_model(model, attention) -> PackedModel:
    """A model with the implementation of this name in IMPLEMENTATIONS."""
    varlen = attention in ("flash-attn", "first-varlen")
    return PackedModel(model, attention="varlen" if varlen else attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_logps_and_reference_equal_separate_forwards(case, attention):
    build, samples = CASES[case]
    model, groups = adapted(build()), groups_of(samples)
    batch = pack_of(groups)
    with torch.no_grad():
        want = separate_logps(model, groups, batch)
        with model.disable_adapter():
            want_reference = separate_logps(model, groups, batch)
        packed = pack_model(model, attention)
        got = packed_logps(packed, batch)
        got_reference = packed_logps(packed, batch, reference=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_reference, want_reference, rtol=0, atol=1e-5)
    assert (want - want_reference).abs().max() > 0.1  # the adapter has an effect
    swapped = want[batch.labels.roll(1) != batch.labels]
    assert swapped.std() > 0.5  # the context has an effect


def test_flex_rows_have_few_lengths_and_fillers_see_themselves():
    lengths = set()
    for words in range(1, 40):
        batch = pack_of(groups_of([preference("a", 3, words=words)]))
        layout = FlexLayout(batch)
        tokens = len(batch.input_ids)
        length = tokens + layout.filler
        lengths.add(length)
        index = torch.arange(length)
        zero = torch.tensor(0)
        seen = layout.mask.mask_mod(zero, zero, index[:, None], index[None, :])
        assert torch.equal(seen[:tokens, :tokens], dense_mask(batch)[0, 0])
        assert not seen[:tokens, tokens:].any()
        assert torch.equal(seen[tokens:], torch.eye(length, dtype=torch.bool)[tokens:])
    assert len(lengths) < 5 and all(length & (length - 1) == 0 for length in lengths)


def compile_flex():
    """The compiled function that a GPU uses."""
    _flex_attention.cache_clear()
    compiled = _flex_attention("cuda")
    _flex_attention.cache_clear()
    return compiled


def use_flex(flex, monkeypatch):
    monkeypatch.setattr("cpo_fast.model.attention._flex_attention", lambda device: flex)


def draw_row(length, heads, *, requires_grad=False):
    return torch.randn(1, heads, length, 16, requires_grad=requires_grad)


@pytest.mark.slow
@pytest.mark.complete
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_flex_equals_the_dense_mask(monkeypatch):
    use_flex(compile_flex(), monkeypatch)
    for words in (2, 9):  # one length, two layouts
        batch = pack_of(groups_of([preference("a", 3, words=words)]))
        tokens = len(batch.input_ids)
        q, k, v = draw_row(tokens, 4), draw_row(tokens, 2), draw_row(tokens, 2)
        mask = dense_mask(batch)
        with torch.no_grad():
            want = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
            )
            got = FlexLayout(batch).attend(q, k, v, scale=0.25, dropout=0.0)
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.complete
def test_flex_is_compiled_once_per_length(monkeypatch):
    """Ten versions (five lengths, with and without gradients) exceed the default limit of torch;
    other layouts of these lengths need no further version."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=counter))
    use_flex(compile_flex(), monkeypatch)
    for words, graphs in (((1, 20, 40, 100, 200), 10), ((2, 21, 41, 101, 201), 10)):
        lengths = set()
        for count in words:
            batch = pack_of(groups_of([preference("a", 3, words=count)]))
            layout, tokens = FlexLayout(batch), len(batch.input_ids)
            lengths.add(tokens + layout.filler)
            for grad in (True, False):
                q, k, v = (draw_row(tokens, heads, requires_grad=grad) for heads in (4, 2, 2))
                with torch.set_grad_enabled(grad):
                    layout.attend(q, k, v, scale=0.25, dropout=0.0)
        assert len(lengths) == 5 and counter.frame_count == graphs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["images", "qwen2", "llama"])
def test_adapter_gradients_equal_separate_forwards(case, attention):
    build, samples = CASES[case]
    model, groups = adapted(build(), freeze_vit=case != "images"), groups_of(samples)
    batch = pack_of(groups)
    with torch.no_grad(), model.disable_adapter():
        reference = separate_logps(model, groups, batch)
    dpo_loss(separate_logps(model, groups, batch), reference, batch).backward()
    want = trainable_grads(model)
    packed = pack_model(model, attention)
    dpo_loss(
        packed_logps(packed, batch), packed_logps(packed, batch, reference=True), batch
    ).backward()
    assert_same_grads(trainable_grads(model), want)


@pytest.mark.parametrize("attention", ["gathered", "sdpa", "varlen"])
def test_policy_equals_reference_before_training(attention):
    model, batch = add_lora(vision_language_model()), pack_of(groups_of(mixed()))
    packed = PackedModel(model.train(), attention=attention)
    policy, reference = packed.hidden(batch), packed.hidden(batch, reference=True)
    assert torch.equal(policy, reference)
    assert policy.requires_grad and not reference.requires_grad


def test_missing_kernel_is_named_on_construction(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # as if missing
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    varlen_kernel.cache_clear()
    with pytest.raises(UsageError, match="flash-attn"):
        PackedModel(vision_language_model(), attention="varlen")
    varlen_kernel.cache_clear()


def test_auto_chooses_the_flash_kernel_or_gathered(monkeypatch):
    model = vision_language_model()
    assert PackedModel(model).attention == "gathered"  # a CPU
    monkeypatch.setattr("cpo_fast.model.packed._check_varlen", lambda *_: None)
    assert PackedModel(model).attention == "varlen"
    model.config.text_config.attention_dropout = 0.1  # not supported by the kernel
    assert PackedModel(model).attention == "gathered"
    model.config.text_config.attention_dropout = 0.0
    model.config.text_config.head_dim = 512  # more than the kernel supports
    assert PackedModel(model).attention == "gathered"


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [("attention_dropout", 0.1, "attention_dropout is 0.1"),
     ("head_dim", 512, "heads of a multiple of 8 up to 256, and the model's have 512"),
     ("head_dim", 36, "have 36 dimensions")],
)  # fmt: skip
def test_varlen_refuses_unsupported_heads_and_dropout(monkeypatch, setting, value, why):
    monkeypatch.setattr("cpo_fast.model.packed._check_varlen", lambda *_: None)  # as on CUDA
    model = vision_language_model()
    setattr(model.config.text_config, setting, value)
    with pytest.raises(UsageError, match=f"attn_implementation varlen .*{why}"):
        PackedModel(model, attention="varlen")
    assert PackedModel(model, attention="sdpa").attention == "sdpa"


def test_gradients_of_repeated_rows_are_summed_in_float32():
    index = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 4])
    rows = RepeatedRows(index, 5, torch.device("cpu"))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(rows.of(x), x[index])
    grad = torch.randn(9, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(rows.of(x), x, grad)
    (want,) = torch.autograd.grad(x[index], x, grad)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # added in float32
    half = grad.bfloat16()
    (got,) = torch.autograd.grad(rows.of(x.bfloat16()), x, half)
    exact = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, index, half.double())
    assert torch.equal(got.bfloat16(), exact.bfloat16())  # rounded once
