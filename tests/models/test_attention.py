"""Who may look at whom, and that every way to attend gives the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stoker.models.attention import SMALLEST_HEAD, _by_blocks, attention, cached_mask, document_mask
from stoker.models.cpu_attention import BLOCK, attend_in_blocks
from tests.models.tiny import decoder, rows, shape

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 14, [0] * 20], dtype=torch.int32)


def test_documents_in_a_row_are_computed_like_separate_rows() -> None:
    config = shape()
    model = decoder(config)
    tokens, _, _ = rows(config)
    positions = torch.tensor([[*range(5), 0, *range(14)], [*range(20)]])
    logits = model(tokens, positions, DOCUMENTS).view(2, 20, -1)
    for row, start, stop in ((0, 0, 5), (0, 5, 6), (0, 6, 20), (1, 0, 20)):
        alone = model(tokens[row : row + 1, start:stop], positions[row : row + 1, start:stop], None)
        torch.testing.assert_close(logits[row, start:stop], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_no_gradient_crosses_rows_documents_or_time(masked: bool, dtype: torch.dtype) -> None:
    config = shape()
    model = decoder(config).to(dtype)
    tokens, positions, _ = rows(config)
    seen: list[Tensor] = []
    # type: ignore[func-returns-value]
    model.embedding.register_forward_hook(lambda *call: seen.append(call[2]) or call[2].retain_grad())
    logits = model(tokens, positions, DOCUMENTS if masked else None).view(2, 20, -1)
    logits[0, 10].sum().backward()
    assert seen[0].grad is not None
    reached = seen[0].grad.view(2, 20, -1).any(-1)
    allowed = torch.zeros(2, 20, dtype=torch.bool)
    allowed[0, 6 if masked else 0 : 11] = True
    assert torch.equal(reached, allowed)


def test_the_mask_is_made_once_per_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(*arguments: object) -> object:
        made.append(1)
        return document_mask(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("stoker.models.attention.document_mask", counting)
    config = shape()
    tokens, positions, _ = rows(config)
    decoder(config)(tokens, positions, DOCUMENTS)
    assert made == [1]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention by the book, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("rqhd,rkhd->rhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("seq_len", [1, 40, BLOCK, 2 * BLOCK + 33])
def test_every_way_to_attend_is_attention_by_the_book(seq_len: int, heads: tuple[int, int], masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seq_len, n, 16) for n in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(size, generator=generator) for size in shapes)
    documents = torch.arange(seq_len).div(60, rounding_mode="floor").int() + torch.zeros(2, 1, dtype=torch.int32)
    documents[1] = 0
    mask = document_mask(documents, torch.float32) if masked else None
    assert mask is None or isinstance(mask, Tensor)
    allowed = torch.ones(seq_len, seq_len, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if masked:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    scale = 0.3 if heads == (6, 1) else None  # by default 1 / sqrt(16)
    expected = plain_attention(q if scale is None else q * 4 * scale, k, v, allowed)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    for way in (attention, attend_in_blocks):
        out = way(q, k, v, mask, scale)
        found = torch.autograd.grad(out, inputs, grad)
        for a, b in zip((out, *found), (expected, *wanted), strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


WINDOWS = [1, 3, 64]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_hides_what_lies_before_it(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seq_len = 150
    q, k, v = (torch.randn(2, seq_len, n, 16, generator=generator) for n in (4, 2, 2))
    documents = torch.zeros(2, seq_len, dtype=torch.int32)
    documents[1, 90:] = 1
    apart = torch.arange(seq_len)[:, None] - torch.arange(seq_len)[None]
    allowed = (apart >= 0) & (apart < window) & (documents[:, None, :, None] == documents[:, None, None, :])
    mask = document_mask(documents, torch.float32, window)
    expected = plain_attention(q, k, v, allowed)
    for way in (attention, attend_in_blocks):
        torch.testing.assert_close(way(q, k, v, mask).double(), expected, rtol=1e-4, atol=1e-5)
    last = cached_mask(7, seq_len, torch.float32, q.device, window)
    found = attention(q[:1, -7:], k[:1], v[:1], last).double()
    torch.testing.assert_close(found, expected[:1, -7:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_with_a_window_sees_the_tokens_of_its_window(masked: bool) -> None:
    """Two layers of a window of 3 reach back 2 tokens each, the one without as far as the document."""
    for full, first in (([], 6 if masked else 4), ([1], 6 if masked else 0)):
        config = shape(num_hidden_layers=2, sliding_window=3, full_attention_layers=full)
        model = decoder(config)
        tokens, positions, _ = rows(config)
        seen: list[Tensor] = []
        # type: ignore[func-returns-value]
        model.embedding.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]) or call[2].retain_grad())
        at = 8
        model(tokens, positions, DOCUMENTS if masked else None).view(2, 20, -1)[0, at].sum().backward()
        assert seen[0].grad is not None
        reached = seen[0].grad.view(2, 20, -1).any(-1)
        allowed = torch.zeros(2, 20, dtype=torch.bool)
        allowed[0, first : at + 1] = True
        assert torch.equal(reached, allowed)


def test_a_window_that_no_sequence_leaves_changes_nothing() -> None:
    config = shape()
    tokens, positions, _ = rows(config)
    plain, windowed = decoder(config), decoder(shape(sliding_window=20))
    assert windowed.mask(positions, None, torch.float32, 20) is None
    assert torch.equal(plain(tokens, positions, DOCUMENTS), windowed(tokens, positions, DOCUMENTS))


def test_bf16_on_a_cpu_is_as_precise_as_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, n, 16, generator=generator).bfloat16() for n in (4, 2, 2))
    allowed = torch.ones(200, 200, dtype=torch.bool).tril()
    expected = plain_attention(q, k, v, allowed)
    error = (attention(q, k, v, None).double() - expected).norm() / expected.norm()
    assert error < 0.01


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_for_gpus_allows_what_the_tensor_for_cpus_allows() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from stoker.models.attention import same_document

    documents = torch.cat([DOCUMENTS] * 8, 1).sort(1).values
    seq_len = documents.shape[1]
    q, k, v = (torch.randn(2, seq_len, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    for window in (None, 5):
        block_mask = create_block_mask(same_document(documents, window), 2, None, seq_len, seq_len, device="cpu")
        flex = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask, enable_gqa=True
        )
        out = attention(q, k, v, document_mask(documents, torch.float32, window))
        torch.testing.assert_close(flex.transpose(1, 2), out, rtol=1e-5, atol=1e-5)


def test_small_heads_are_filled_up_for_flex_attention_and_change_nothing() -> None:
    """Its kernels refuse heads of fewer than 16 channels; here a function that refuses them too stands for it."""
    q, k, v = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 8)
    wanted = attention(q, k, v, document_mask(DOCUMENTS, torch.float32))

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, block_mask: object, scale: float, enable_gqa: bool) -> Tensor:
        assert min(x.shape[-1] for x in (q, k, v)) >= SMALLEST_HEAD and enable_gqa
        mask = document_mask(DOCUMENTS, torch.float32)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    found = _by_blocks(kernel, q, k, v, object())  # type: ignore[arg-type]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 8), (torch.bfloat16, 2)])
def test_on_gpus_fp32_keys_are_repeated_as_no_fused_kernel_groups_them(dtype, heads, monkeypatch) -> None:
    seen = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 32, n, 64, device="cuda", dtype=dtype) for n in (8, 2, 2))
        assert attention(q, k, v, None).shape == q.shape
    assert seen == [(heads, heads, heads != 8)]


def test_repeated_keys_are_those_of_their_queries() -> None:
    q, k, v = torch.randn(2, 20, 4, 8), torch.randn(2, 20, 2, 8), torch.randn(2, 20, 2, 8)
    repeated = (x.repeat_interleave(2, 2) for x in (k, v))
    torch.testing.assert_close(attention(q, *repeated, None), attention(q, k, v, None), rtol=1e-6, atol=1e-6)
