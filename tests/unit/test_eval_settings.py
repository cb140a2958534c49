"""Settings of `firstlight eval` by name, and controls that get as much as the method got."""

from __future__ import annotations

import pytest

from firstlight.attention.band import Band
from firstlight.core.calibration import Calibration
from firstlight.core.config import Options
from firstlight.core.errors import UserError
from firstlight.core.parts import PromptIds
from firstlight.core.registry import Part, make_parts
from firstlight.evaluate import grid
from firstlight.evaluate.books import BOOKS, digest_of
from firstlight.evaluate.peak import attention_flops, prefill_flops
from firstlight.evaluate.recall import capture, measure
from firstlight.evaluate.settings import controls, dense_of, name_of, setting_of
from tests.tiny import VOCABULARY, tiny_config, tiny_engine


@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "dense + int8",
        "dense + int8:kv=bf16",
        "band:window=512",
        "band:sink=64,window=512 + f32",
        "lazyllm + band:window=64",
    ],
)
def test_a_setting_is_written_as_it_is_printed(text: str) -> None:
    assert name_of(setting_of(Options(seed=7, precision="int8"), text)) == text
    assert setting_of(Options(seed=7), text).seed == 7


@pytest.mark.parametrize(
    ("text", "said"), [("f32 + int8", "can't read"), ("band + ", "can't read"), ("band:nothing=1", "has no setting")]
)
def test_a_wrong_setting_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        setting_of(Options(), text)


def found(density: float, computed: float = 1.0, length: int = 2000) -> dict[str, Options]:
    made = controls(Options(method=("lazyllm",)), density, computed, length, tiny_config())
    return {name_of(control).partition(":")[0]: control for control in made}


def test_the_control_band_reads_as_many_keys() -> None:
    taken = capture(tiny_engine(prefix_cache="off"), PromptIds([n * 37 % VOCABULARY for n in range(2000)]), [0])
    for density in (0.1, 0.3, 0.6):
        (method,) = found(density)["band"].methods
        assert measure(taken, make_parts([method]))["density"] == pytest.approx(density, abs=0.03)


def test_a_shortened_prompt_costs_what_the_method_cost() -> None:
    config, length = tiny_config(), 2000
    share = attention_flops(config, length) / prefill_flops(config, length)
    for density, computed in ((0.1, 1.0), (0.5, 1.0), (0.5, 0.6)):
        rate = found(density, computed)["truncate"].methods[0].settings["rate"]
        wanted = (1 - share) * computed + share * density
        assert (1 - share) * rate + share * rate**2 == pytest.approx(wanted, abs=0.02)
        assert found(density, computed)["bm25"].methods[0].settings["rate"] == rate


def test_dense_has_no_band_for_control_and_nothing_to_shorten() -> None:
    assert found(1.0).keys() == {"dense + f32", "dense + int8"}
    assert all(dense_of(control) == dense_of(Options()) for control in found(1.0).values())


def test_what_was_calibrated_on_a_text_of_evaluation_is_refused() -> None:
    def calibrated(texts: dict[str, str]) -> Part:
        made = Calibration("lazyllm", "model", {}, texts, {"a": 1}, "file.json")
        return Part("lazyllm", "attention", None, None, Band.capability, made)

    with pytest.raises(UserError, match=f"file.json of lazyllm was made on {BOOKS[1]}, which `eval` judges on"):
        grid._calibrations([calibrated({"my text": digest_of(BOOKS[1])})])
    assert grid._calibrations([calibrated({"another": "0" * 64})]).keys() == {"lazyllm"}
