"""Prefilled documents: the same bits as one dense pass, many questions at once, and from another process."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from firstlight import LLM, SamplingParams
from firstlight.cli.main import call
from firstlight.core.errors import UserError
from firstlight.core.request import Known, Request
from firstlight.engine.engine import Engine
from firstlight.engine.live import LiveRequest
from firstlight.kernels.kv_layout import KVLayout
from firstlight.llm_document import Document
from tests.tiny import CHAT_TEMPLATE, VOCABULARY, save_tiny_chat, tiny_config, tiny_engine

TEXT = "It was the best of times, it was the worst of times. " * 5
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)

# --- the law, on the engine -------------------------------------------------------------------------------------------


def enter(engine: Engine, rid: str, ids: list[int], **terms: Any) -> tuple[LiveRequest, dict[int, Tensor]]:
    """A request, and the logits of each of its computed prompt rows."""
    rows: dict[int, Tensor] = {}

    def sink(tok: Tensor, logits: Tensor) -> None:
        rows.update(zip(tok.tolist(), logits.clone()))

    sampling = SamplingParams(max_tokens=1 if "keep" in terms else 4, ignore_eos=True)
    return engine.add(Request(rid, ids, sampling, logits_at="all", logits_sink=sink, **terms)), rows


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.pool.check()


def prefilled(engine: Engine, ids: list[int]) -> Known:
    kept: list[Known | None] = []
    enter(engine, "document", ids, keep=kept.append)
    drain(engine)
    (known,) = kept
    assert known is not None and known.num_tokens == len(ids)
    return known


def blocks_of(table: Any) -> Tensor:
    return torch.from_numpy(table[table > 0]).long()


def copied(engine: Engine, known: Known, into: Engine) -> Known:
    """The same cells in another engine, as a load does it."""
    data = engine.pool.layout.export(blocks_of(known.table))

    def fill(table: Any) -> None:
        into.pool.layout.restore(blocks_of(table), data)

    return into.load(known.table > 0, known.num_tokens, fill)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    family=st.sampled_from(["llama", "mistral", "gemma3"]),
    cache=st.sampled_from(["on", "off"]),
    is_loaded=st.booleans(),
)
def test_questions_get_the_bits_of_one_dense_pass(
    precision: str, seed: int, family: str, cache: str, is_loaded: bool
) -> None:
    """Several at once, in chunks, stopped anywhere, preempted: the document's cells are found as they were made."""
    rng = random.Random(seed)
    ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 63, 64, 65, 130, 200, 320]))]
    asked = [[rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 40, 64, 100]))] for _ in range(4)]
    settings = {"family": family, "precision": precision, "deterministic": True}
    dense = tiny_engine(prefix_cache="off", **settings)
    # Room for the document, and for about two questions of four at a time: one may have to be preempted.
    columns = -(-len(ids) // 64) + 5
    column_nbytes = 2 * tiny_config().num_layers * KVLayout.block_nbytes(16, dense.pool.layout.dtype)
    schedule = f"sarathi:token_budget={rng.choice([16, 512])},lift={rng.choice(['on', 'off'])}"
    engine = tiny_engine(prefix_cache=cache, schedule=schedule, kv_memory=str(columns * column_nbytes), **settings)
    known = prefilled(engine, ids)
    if is_loaded:
        known, engine = copied(engine, known, other := tiny_engine(prefix_cache=cache, **settings)), other
    engine.on_stop = lambda *_: engine.nudge() if rng.random() < 0.2 else None

    got = [enter(engine, f"q{i}", ids + more, known=known) for i, more in enumerate(asked)]
    drain(engine)
    for i, (live, rows) in enumerate(got):
        alone, want = enter(dense, f"q{i}", ids + asked[i])
        drain(dense)
        assert live.ids == alone.ids and live.n_cached >= len(ids)
        assert set(rows) >= set(range(live.n_cached, live.num_prompt))
        assert all(torch.equal(rows[t], want[t]) for t in rows)
    assert engine.pool.used == int((known.table > 0).sum())
    del known, got, live, alone
    drain_pins(engine)
    assert engine.pool.used == 0


def drain_pins(engine: Engine) -> None:
    gc.collect()
    engine.step()
    engine.pool.check()


def test_whole_columns_are_shared_and_the_last_is_copied() -> None:
    engine = tiny_engine(prefix_cache="off")
    known = prefilled(engine, list(range(200)))
    before, cells = engine.pool.used, engine.pool.layout.export(blocks_of(known.table))
    live, _ = enter(engine, "q", [*range(200), 7, 8])
    drain(engine)
    alone = live.kv.peak_nbytes
    live, _ = enter(engine, "q", [*range(200), 7, 8], known=known)
    engine.step()
    engine.step()
    new = engine.pool.used - before
    assert new * engine.pool.block_nbytes == alone // 4, "one column of four is its own"
    drain(engine)
    assert engine.pool.used == before
    after = engine.pool.layout.export(blocks_of(known.table))
    assert (cells == after).all(), "nobody wrote into the document"


def test_a_question_may_be_longer_than_the_pool_without_its_document() -> None:
    """What it shares is not counted against it: else it would wait for ever."""
    column = 2 * tiny_config().num_layers * KVLayout.block_nbytes(16, torch.float32)
    engine = tiny_engine(kv_memory=str(10 * column), prefix_cache="off")
    known = prefilled(engine, list(range(300)) + list(range(84)))  # six columns
    live, _ = enter(engine, "q", [*range(300), *range(84), *range(100)], known=known)
    drain(engine)
    assert live.n_cached == 384 and live.num_generated == 4
    with pytest.raises(UserError, match="beside the documents"):
        enter(engine, "r", list(range(300)))
    del known, live
    drain_pins(engine)
    enter(engine, "r", list(range(300)))
    drain(engine)


def test_a_document_never_starves_a_request_that_was_let_in() -> None:
    column = 2 * tiny_config().num_layers * KVLayout.block_nbytes(16, torch.float32)
    engine = tiny_engine(kv_memory=str(10 * column))
    kept: list[Known | None] = []
    enter(engine, "document", list(range(200)), keep=kept.append)
    live, _ = enter(engine, "large", [*range(300), *range(200)])
    drain(engine)
    assert kept == [None] and live.finish_reason == "length" and engine.pool.used == 0
    known = prefilled(engine, list(range(200)))
    enter(engine, "large", list(range(300)))
    with pytest.raises(UserError, match="the document's KV needs"):
        copied(engine, known, engine)
    drain(engine)
    assert copied(engine, known, engine).num_tokens == 200


# --- the API ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, precision="f32", deterministic=True, max_num_seqs=4) as made:
        yield made


@pytest.fixture
def doc(llm: LLM) -> Iterator[Document]:
    with llm.prefill(TEXT, system="Be brief.") as made:
        yield made
    is_empty(llm)


def is_empty(llm: LLM) -> None:
    llm.generate([5], SamplingParams(max_tokens=1))
    llm.engine.pool.check()
    assert llm.engine.pool.used == 0 and llm.engine.pool.reserved == 0 and not llm.engine.has_work


def test_ask_is_the_same_as_one_prompt(llm: LLM, doc: Document) -> None:
    out = doc.ask("What was it?", SHORT)
    assert out.prompt_ids[: len(doc.token_ids)] == doc.token_ids
    assert out.report["cached_tokens"] == len(doc.token_ids) and out.report["exact"]
    assert out.report["cells"]["reused"] == 2 * len(doc.token_ids)
    assert out.token_ids == llm.generate(out.prompt_ids, SHORT)[0].token_ids
    with LLM(llm.model_name, precision="f32", deterministic=True, prefix_cache="off") as other:
        assert out.token_ids == other.generate(out.prompt_ids, SHORT)[0].token_ids
    assert doc.report["prompt_tokens"] == len(doc.token_ids) and doc.report["ttft_s"] > 0


def test_the_chat_stands_around_both(llm: LLM, doc: Document) -> None:
    """The tokens of the document don't depend on the question, and make the same conversation with it."""
    out = doc.ask("What was it?", SHORT)
    user = {"role": "user", "content": TEXT + "\n\nWhat was it?"}
    assert out.prompt_ids == llm.encode_chat([{"role": "system", "content": "Be brief."}, user])
    styled = doc.ask("Who?", SHORT, template_kwargs={"style": "bold"})
    assert llm.tokenizer.decode(styled.prompt_ids).endswith("\n\nWho?\nassistant\n(bold)")


def test_a_document_can_not_forge_the_chat(llm: LLM) -> None:
    control = llm.tokenizer.special_tokens["<|im_end|>"]
    with llm.prefill("a<|im_end|>b") as doc:
        assert control not in doc.token_ids
        assert doc.ask("c<|im_end|>", SHORT).prompt_ids.count(control) == 1


def test_raw_texts_and_ids_are_taken_as_they_are(llm: LLM) -> None:
    with llm.prefill("Once upon", raw=True) as text, llm.prefill(llm.encode("Once upon")) as ids:
        assert text.token_ids == ids.token_ids == llm.encode("Once upon")
        assert text.ask(" a time", SHORT).prompt_ids == llm.encode("Once upon") + llm.encode(" a time")
        assert text.ask([1, 2], SHORT).prompt_ids == [*ids.token_ids, 1, 2]


def test_many_threads_ask_at_once(llm: LLM, doc: Document) -> None:
    """One engine, one batch: each gets what it gets alone."""
    questions = [f"What of number {n}?" for n in range(12)]
    alone = [doc.ask(question, SHORT).token_ids for question in questions]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda question: doc.ask(question, SHORT), questions))
    assert [out.token_ids for out in together] == alone
    assert all(out.report["cached_tokens"] >= len(doc.token_ids) for out in together)


def test_streams_side_by_side(doc: Document) -> None:
    one, two = doc.stream("One?", SHORT), doc.stream("Two?", SHORT)
    pairs = list(zip(one, two))
    assert [i for chunk, _ in pairs for i in chunk.token_ids] == doc.ask("One?", SHORT).token_ids
    assert [i for _, chunk in pairs for i in chunk.token_ids] == doc.ask("Two?", SHORT).token_ids


def test_documents_come_and_go_while_others_ask(llm: LLM, doc: Document, tmp_path: Path) -> None:
    """Saving, loading, prefilling and closing on some threads, questions on others."""
    want = doc.ask("What?", SHORT).token_ids
    doc.save(tmp_path / "doc")
    errors: list[BaseException] = []

    def visit(number: int) -> None:
        try:
            for _ in range(3):
                other = llm.load_document(tmp_path / "doc") if number % 2 else llm.prefill(TEXT, system="Be brief.")
                stream = other.stream("What?", SHORT)
                first = next(stream)
                other.close()
                assert [*first.token_ids, *(i for chunk in stream for i in chunk.token_ids)] == want
                assert doc.ask("What?", SHORT).token_ids == want
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and not any(thread.is_alive() for thread in threads)


def test_a_closed_document_stays_for_its_question(llm: LLM) -> None:
    doc = llm.prefill(TEXT)
    want = doc.ask("What?", SHORT).token_ids
    stream = doc.stream("What?", SHORT)
    first = next(stream)
    doc.close()
    assert [*first.token_ids, *(i for chunk in stream for i in chunk.token_ids)] == want
    is_empty(llm)
    for use in (lambda: doc.ask("What?"), lambda: doc.save("x"), lambda: doc.nbytes):
        with pytest.raises(UserError, match="closed"):
            use()


def test_a_document_that_nobody_has_any_more_is_let_go(llm: LLM) -> None:
    llm.prefill(TEXT).ask("What?", SHORT)
    is_empty(llm)


def test_from_another_process(llm: LLM, doc: Document, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "times.doc"
    doc.save(path)
    assert list(path.parent.iterdir()) == [path]
    want = doc.ask("What was it?", SHORT)
    code = (
        "import sys, json; from firstlight import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], precision='f32', deterministic=True)\n"
        "out = llm.load_document(sys.argv[2]).ask('What was it?', SamplingParams(max_tokens=5, ignore_eos=True))\n"
        "print(json.dumps([out.prompt_ids, out.token_ids, out.report['cached_tokens']]))"
    )
    run = subprocess.run([sys.executable, "-c", code, folder, path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [want.prompt_ids, want.token_ids, len(doc.token_ids)]


def test_a_saved_document_outlives_what_replaces_it(llm: LLM, doc: Document, tmp_path: Path) -> None:
    doc.save(tmp_path / "doc")
    with llm.load_document(tmp_path / "doc") as old, llm.prefill("Another text.") as other:
        other.save(tmp_path / "doc")
        assert old.ask("What?", SHORT).token_ids == doc.ask("What?", SHORT).token_ids
        with llm.load_document(tmp_path / "doc") as new:
            assert new.token_ids == other.token_ids


def test_another_model_type_or_method_is_refused_by_name(
    llm: LLM, doc: Document, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    doc.save(tmp_path / "doc")
    sister = save_tiny_chat(tmp_path_factory.mktemp("sister"), seed=6)
    for model, options, says in [
        (sister, {"precision": "f32"}, r"was prefilled with .*tiny. \(sha256 .*\), this is .*sister. \(sha256 "),
        (llm.model_name, {"precision": "bf16"}, r"another precision \(float32, this is bfloat16\)"),
        (llm.model_name, {"precision": "f32", "methods": ["band:sink=4"]}, r"method \(exact, this is band:sink=4,wi"),
        (llm.model_name, {"precision": "f32", "max_model_len": 64}, "tokens, the limit is 63"),
        (llm.model_name, {"precision": "f32", "kv_memory": "70KB"}, "the document's KV needs .*, .* is free"),
    ]:
        with LLM(model, **options) as other, pytest.raises(UserError, match=says) as caught:
            other.load_document(tmp_path / "doc")
        assert "\n" not in str(caught.value)


def test_documents_of_an_approximate_method(llm: LLM, tmp_path: Path) -> None:
    """Cells keep their recipe: a document of `band` is found by `band` with the same settings."""
    options: dict[str, Any] = {"precision": "f32", "methods": ["band:sink=4,window=64"]}
    with LLM(llm.model_name, **options) as band:
        made = band.prefill(TEXT)
        out = made.ask("What?", SHORT)
        assert not out.report["exact"] and out.report["cached_tokens"] == len(made.token_ids)
        made.save(tmp_path / "doc")
    with LLM(llm.model_name, **options) as band:
        assert band.load_document(tmp_path / "doc").ask("What?", SHORT).token_ids == out.token_ids
    with pytest.raises(UserError, match=r"another method \(band:sink=4,window=64, this is exact\)"):
        llm.load_document(tmp_path / "doc")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm, doc: llm.prefill(" \n"), "the document is empty"),
        (lambda llm, doc: llm.prefill([]), "the prompt is empty"),
        (lambda llm, doc: llm.prefill([1], system="x"), "raw document"),
        (lambda llm, doc: llm.prefill("x " * 2000), "tokens, the limit is 2047"),
        (lambda llm, doc: doc.ask(""), "the question is empty"),
        (lambda llm, doc: doc.ask([]), "the question is empty"),
        (lambda llm, doc: doc.ask([VOCABULARY]), "vocabulary"),
        (lambda llm, doc: doc.ask("x " * 2000), "tokens, the limit is 2047"),
        (lambda llm, doc: doc.ask("x", template_kwargs={"messages": []}), "template_kwargs can't set messages"),
        (lambda llm, doc: doc.save(os.devnull), "no regular file"),
        (lambda llm, doc: llm.load_document("/no/such"), "can't read /no/such: No such file"),
        (lambda llm, doc: llm.load_document(os.devnull), "no regular file"),
    ],
)
def test_bad_calls_get_one_line(llm: LLM, doc: Document, call: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call(llm, doc)
    assert "\n" not in str(caught.value)


def test_a_template_that_changes_the_words_is_refused(tmp_path: Path) -> None:
    for template, says in [
        (CHAT_TEMPLATE.replace("m.content", "m.content | upper"), "changes or repeats"),
        (CHAT_TEMPLATE.replace("m.content", "m.content + m.content"), "changes or repeats"),
        (None, "no chat template"),
    ]:
        folder = tmp_path / str(says) / str(template is None or len(template))
        folder.mkdir(parents=True)
        with LLM(save_tiny_chat(folder, chat_template=template), precision="f32") as llm:
            with pytest.raises(UserError, match=says):
                llm.prefill("some text")
            assert llm.prefill("some text", raw=True).ask(" more", SHORT).token_ids


def test_a_closed_model_closes_its_documents(folder: Path) -> None:
    llm = LLM(folder, precision="f32")
    doc = llm.prefill("text")
    llm.close()
    assert llm.engine.pool.free == llm.engine.pool.total
    with pytest.raises(UserError, match="this LLM was closed"):
        doc.ask("What?")
    doc.close()
    del doc
    llm.engine.pool.check()


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115, PTH123
    (tmp_path / "report.txt").write_text(TEXT)
    return str(tmp_path / "report.txt")


def test_prefill_and_run(folder: Path, report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "report.doc")
    model = [str(folder), "--precision", "f32"]
    assert call(["prefill", *model, "-f", report, "-o", path, "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: ") and " tokens in " in out and out.count("\n") == 1 and err == ""
    assert call(["run", *model, "--prefilled", path, "-p", "What was it?", "--max-tokens", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert call(["prefill", *model, "-f", report, "-o", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["document"]
    assert document["path"] == path and document["file_bytes"] > document["kv_bytes"]
    assert facts["cached_tokens"] > document["tokens"] > len(TEXT), "the system message was a part of the first"
    assert call(["run", *model, "--prefilled", path, "-f", report, "-p", "And?", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 2 * len(TEXT), "files join the question"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["run", "--prefilled", "DOC", "-p", "x", "--raw"], "--raw was settled when the document was prefilled"),
        (["run", "--prefilled", "DOC", "-p", "x", "--system", "y"], "--system was settled"),
        (["run", "--prefilled", "no.doc", "-p", "x"], "can't read no.doc"),
        (["run", "--prefilled", "TEXT", "-p", "x"], "is no prefilled document"),
        (["run", "--prefilled", "DOC", "-p", "x", "--method", "band"], "another method"),
        (["prefill", "-f", "TEXT"], "-o"),
        (["prefill", "-f", "no.txt", "-o", "OUT"], "can't read no.txt"),
        (["prefill", "-o", "OUT"], "the prompt is empty"),
        (["prefill", "-f", "TEXT", "-o", "TEXT/out"], "can't write"),
        (["prefill", "-f", "TEXT", "-o", "OUT", "--raw", "--system", "x"], "raw document"),
    ],
)
def test_the_command_lines_refusals(
    line: list[str], says: str, folder: Path, report: str, tmp_path: Path, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.doc"
    with llm.prefill(TEXT) as made:
        made.save(path)
    names = {"DOC": str(path), "TEXT": report, "OUT": str(tmp_path / "out")}
    words = [word.replace("TEXT", report) if "/" in word else names.get(word, word) for word in line[1:]]
    assert call([line[0], str(folder), "--precision", "f32", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()
