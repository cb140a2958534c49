"""A planner inside an unmodified transformers model: what it reads, what it leaves to sdpa, and that it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from firstlight.core.errors import UserError
from firstlight.integrations import transformers as fl

LAYERS = 2
SINK, WINDOW = 16, 40


def model(attention: str, **changes: Any) -> LlamaForCausalLM:
    """The same weights under any attention."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=256, attn_implementation=attention, **changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))


def banded(num: int) -> torch.Tensor:
    """Additive [1, 1, num, num]: what a row of the band sees."""
    row, key = torch.arange(num)[:, None], torch.arange(num)
    see = (key <= row) & ((key < SINK) | (row - key < WINDOW))
    return torch.zeros(1, 1, num, num).masked_fill_(~see, torch.finfo(torch.float32).min)


def test_a_band_is_a_masked_eager_pass(ids: torch.Tensor) -> None:
    used = fl.register(f"band:sink={SINK},window={WINDOW}")
    ours = model("firstlight")(ids).logits
    eager = model("eager")(ids, attention_mask=banded(300)).logits
    assert torch.allclose(ours, eager, atol=1e-5)
    assert not torch.allclose(ours, model("eager")(ids).logits, atol=1e-3)
    said = used.report()
    assert said["planned"] == LAYERS and said["sdpa"] == {}
    assert said["density"] == pytest.approx(float((banded(300) == 0).sum() / (300 * 301 / 2)))


def test_chunks_over_a_cache_are_the_whole(ids: torch.Tensor) -> None:
    used = fl.register(f"band:sink={SINK},window={WINDOW}")
    ours, past, parts = model("firstlight"), None, []
    for part in ids.split(110, 1):
        out = ours(part, past_key_values=past, use_cache=True)
        past, parts = out.past_key_values, [*parts, out.logits]
    assert torch.allclose(torch.cat(parts, 1), ours(ids).logits, atol=1e-5)
    assert used.report()["sdpa"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_is_sdpa_bit_for_bit(ids: torch.Tensor, dtype: torch.dtype) -> None:
    used = fl.register("band:window=1048576")
    assert torch.equal(model("firstlight").to(dtype)(ids).logits, model("sdpa").to(dtype)(ids).logits)
    assert used.report() == {"planned": 0, "sdpa": {"dense was planned": LAYERS}, "density": 1.0}


def test_it_generates_and_what_is_generated_is_read_densely(ids: torch.Tensor) -> None:
    used = fl.register(f"band:sink={SINK},window={WINDOW}")
    ours = model("firstlight")
    made = ours.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    cache = ours(ids, use_cache=True).past_key_values
    ours.set_attn_implementation("sdpa")
    again = ours(made[:, 300:301], past_key_values=cache).logits
    assert made.shape == (1, 304) and made[0, 301] == again[0, -1].argmax()
    assert used.report()["sdpa"] == {"generated tokens": 3 * LAYERS}


def test_a_padded_sequence_goes_to_sdpa_and_the_one_beside_it_does_not(ids: torch.Tensor) -> None:
    used = fl.register(f"band:sink={SINK},window={WINDOW}")
    both = torch.cat([ids, ids])
    mask = torch.ones_like(both)
    mask[1, :60] = 0
    ours, dense = (model(name)(both, attention_mask=mask).logits for name in ("firstlight", "sdpa"))
    assert used.report() | {"density": 0} == {
        "planned": LAYERS,
        "sdpa": {"its mask is not causal": LAYERS},
        "density": 0,
    }
    assert torch.allclose(ours[1, 60:], dense[1, 60:], atol=1e-5)
    assert torch.allclose(ours[0], model("firstlight")(ids).logits[0], atol=1e-5)


def test_training_is_left_alone(ids: torch.Tensor) -> None:
    used = fl.register(f"band:sink={SINK},window={WINDOW}")
    with torch.enable_grad():
        model("firstlight")(ids).logits.sum().backward()
    assert used.report()["sdpa"] == {"gradients are wanted": LAYERS}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fl.register(), "no method was given"),
        (lambda: fl.register("fastkv"), "no attention part"),
        (lambda: fl.register("duoattention"), "model=PATH"),
        (lambda: fl.register("nonsense"), "no method is called"),
    ],
)
def test_what_can_not_be_registered_is_said(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()
