"""What a part of a method is: its capability record and the protocols of the seams.

A method is a name with one part per seam that it touches. The engine reads capabilities, never a part's type.
All hooks are optional: a part derives from the class of its seam here and overrides what it needs; the defaults are
dense. A part of any seam may have `bind(model, calibration)`: the registry calls it once, before the first request, and
what it refuses with a UserError is refused. Hook names and meanings: README-tokens-cache of the design, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from firstlight.core.calibration import Calibration

if TYPE_CHECKING:
    from torch import Tensor

Range = tuple[int, int]
"""[lo, hi): places of tokens or characters."""
Seam = Literal["prompt", "reuse", "schedule", "tokens", "attention", "cache", "decode"]


@dataclass(frozen=True, slots=True)
class Capability:
    """What a part needs and what it breaks."""

    exact: bool = False
    """Gives the logits of one dense pass."""
    alters_cells: bool = True
    """K/V computed under it differ from dense, so they carry its recipe."""
    prefix_stable: bool = True
    """A token's cells depend only on the tokens before it: they may be published and hit."""
    chunk_invariant: bool = True
    """The result doesn't depend on how the prompt is cut into chunks."""
    whole_prompt: bool = False
    """All prompt rows must be in one segment."""
    last_rows: int = 0
    """Prompt rows at the end that must be computed, never taken from a cache (probe rows)."""
    chunk: int | None = None
    """A segment length that every policy honours, for a lone request too."""
    digests: tuple[str, ...] = ()
    """Per-block summaries that the cache must write."""
    looks: bool = False
    """A planner that looks at keys, so that planning takes time which must pay."""
    some_heads: bool = False
    """A planner that decides only the query heads that its `heads(layer)` tells, bool [Hq] or None for none."""
    calibration: bool = False
    """Reads a calibration file: its settings have the key `calibration`, `bind` is given what is in it."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a part may know of the model before the first request."""

    digest: str
    """sha256 of its files."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """The window of each layer in tokens; None = reads all."""
    machine: str = ""
    """What speeds hang on: processor, threads, precision."""
    max_len: int = 0
    """Tokens that a prompt and its answer may have together."""

    @property
    def full_layers(self) -> list[int]:
        """Layers that read all tokens, ascending."""
        return [layer for layer, window in enumerate(self.windows) if window is None]


@dataclass(frozen=True, slots=True)
class Probe:
    """Which rows' attention a part wants summed: the last n prompt rows, or all."""

    last_n: int | Literal["all"] = 1


@dataclass(frozen=True, slots=True)
class Obs:
    """What probing saw in one layer of one request, over the rows of the prompt seen so far."""

    colsum: Tensor
    """f32 [Hkv, n]: softmax mass on each view entry, summed over probe rows and the query heads of the group."""
    tok: Tensor
    """i64 [Hkv, n]: ordinal of each entry."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Only `keep` of the rows are alive into the next layer; with `park` the others can be revived later."""

    keep: Tensor
    """i64 [m] ordinals, ascending."""
    park: bool = False
    early: bool = False
    """A hint: the rows may leave before the MLP."""


@dataclass(frozen=True, slots=True)
class Enter:
    """What changes when the rows of a pass enter a layer."""

    skip: Tensor | None = None
    """bool [n]: rows that pass the layer by, without K/V."""
    revive: Tensor | None = None
    """i64 [m] ordinals that come back from the park store."""
    visible: Tensor | None = None
    """i64 [m] ordinals that this pass may read; None = all."""


@dataclass(frozen=True, slots=True)
class Keep:
    """K/V that stay: for each KV head ascending entry numbers of the view."""

    idx: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Merge:
    """K/V that fold into others: entry i of KV head h goes into entry assign[h][i] of the view, which stays as it is
    where assign[h][i] = i. A kept entry keeps its ordinal and position (LOOK-M, arXiv 2406.18139, section 3.3)."""

    assign: Sequence[Tensor]
    """i64 [n] for each KV head; assign[h][assign[h]] = assign[h]."""
    mode: Literal["mean", "pivot", "weighted"] = "pivot"


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [lo, hi) of a prompt whose K/V a source has, from wherever they stood.

    `exact`: no rows are computed for them. `relay`, `blend`: the method's row policy says which are, and what is
    computed takes the place of what was loaded.
    """

    lo: int
    hi: int
    handle: Any
    """Whatever the source finds its cells by."""
    fidelity: Literal["exact", "relay", "blend"] = "exact"
    hidden_at: int | None = None
    """A layer whose input rows the source has too: they can be revived there."""


@dataclass(frozen=True, slots=True)
class SpanKV:
    """A span's K/V in one layer."""

    k: Tensor
    """[n, Hkv, D]."""
    v: Tensor
    pos: Tensor
    """i64 [n]: the positions that the keys were rotated for, if they were."""
    rotated: bool = True


@dataclass(frozen=True, slots=True)
class Cells:
    """K/V of some tokens of a prompt in one layer, keys rotated for their positions."""

    tok: Tensor
    """i64 [n] ordinals, ascending."""
    k: Tensor
    """[n, Hkv, D]."""
    v: Tensor


@dataclass(frozen=True, slots=True)
class Streams:
    """KV heads of which rows read the first and the last tokens only, whatever the prompt."""

    heads: Sequence[Sequence[bool]]
    """[layers][Hkv]."""
    sink: int
    """First tokens."""
    recent: int
    """Last tokens, the row's own included."""


@dataclass(slots=True)
class PartContext:
    """Read-only facts of a request, and the part's own scratch."""

    rid: str
    prompt_len: int
    num_layers: int
    final: bool = False
    """The last prompt row is in this pass (a decode pass: always)."""
    decode: bool = False
    ids: Sequence[int] = ()
    entries: Callable[[], tuple[Tensor, Tensor]] | None = None
    """In `after_layer`: k, v [Hkv, n, D] of the view's entries, read when called."""
    state: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON values for the request's report; `why` says what the part did otherwise than asked."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The sub-batch of one request, as a hook sees it."""

    x: Tensor
    """[n, D] hidden rows."""
    tok: Tensor
    """i64 [n] ordinals, ascending."""
    pos: Tensor
    """i64 [n]."""


class Bound:
    """A part that looks at the model before it is used."""

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        """Called once. Raises UserError if the method can't do with this model, or needs a calibration and has none."""


class RowPolicy(Bound):
    """The tokens/ part of a method: which cells are computed at all."""

    prompt_only: bool = False
    """Generated tokens go through all layers: hooks are asked about rows of the prompt alone."""

    def barriers(self) -> tuple[int, ...]:
        """Layers after which a cut needs every prompt row (README-tokens-cache rule 4)."""
        return ()

    def rows0(self, tok: Tensor, ctx: PartContext) -> Tensor | None:
        """bool [n]: False = the token starts without a row. None = all start."""
        return None

    def probe(self, layer: int) -> Probe | None:
        return None

    def before_layer(self, layer: int, rows: RequestRows, parked: Tensor, ctx: PartContext) -> Enter | None:
        """`parked`: i64 ordinals that can be revived into this layer."""
        return None

    def on_kv(
        self, layer: int, rows: RequestRows, k: Tensor, v: Tensor, old: Cells | None, ctx: PartContext
    ) -> Cut | None:
        """k, v [n, Hkv, D] before they are written; `old`: what a source loaded for tokens of this pass."""
        return None

    def after_attend(self, layer: int, rows: RequestRows, obs: Obs | None, ctx: PartContext) -> Cut | None:
        return None

    def at_barrier(self, layer: int, tok: Tensor, obs: Obs | None, ctx: PartContext) -> Cut:
        """The cut of a barrier layer, over all rows alive there (i64 [n], ascending)."""
        return Cut(keep=tok)


class Retention(Bound):
    """The cache/ part of a method: which K/V stay after a layer's last use in this pass."""

    scope: Literal["prompt", "chunk", "step"] = "prompt"

    def probe(self, layer: int) -> Probe | None:
        return None

    def streams(self) -> Streams | None:
        """KV heads whose middle tokens no row reads: they are freed while the prompt runs, without being moved.

        Asked once, after `bind`: what a request may hold at most follows from it. The planner must keep to it.
        """
        return None

    def after_layer(
        self, layer: int, tok: Tensor, length: Sequence[int], obs: Obs | None, ctx: PartContext
    ) -> Keep | Merge | None:
        """`tok` i64 [Hkv, n]: ordinals of the view's entries, `length[h]` of them in head h."""
        return None


class KVSource(Bound):
    """The reuse/ part of a method: K/V that exist already, of tokens that may have stood elsewhere."""

    def find(self, ctx: PartContext) -> Sequence[Span]:
        """Spans of the prompt `ctx.ids`, ascending, without overlap. Called at admission."""
        return ()

    def load(self, span: Span, layer: int) -> SpanKV | None:
        """A span's cells in a layer; None = there are none, its rows must be computed."""
        return None

    def load_hidden(self, span: Span) -> Tensor | None:
        """f32 [n, D]: the rows that enter layer `span.hidden_at`, of spans that have one."""
        return None

    def store(self, ctx: PartContext, read: Callable[[int], Cells]) -> None:
        """A prompt was prefilled and nothing of it was dropped: `read(layer)` gives its cells."""


class Scorer(Protocol):
    """Surprisal of tokens under the model that will answer; `llm` supplies it."""

    def nll(
        self, ids: Sequence[int], *, first: int = 0, layers: int | None = None, among: Sequence[int] | None = None
    ) -> Sequence[float]:
        """-log p of each of `ids[first:]`, given all before it; 0 for a first token, before which nothing is.

        `layers`: look through the head after so many layers (logit lens); None = all. `among`: the only tokens that
        could have come, those of `ids[first:]` included; None = all. What `ids` and those of the call before have in
        common from the start isn't computed again.
        """
        ...


def _no_text(ids: Sequence[int]) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class PromptIds:
    """A prompt before admission: its ids, and what of them is whose."""

    ids: Sequence[int]
    context: Sequence[Range] = ()
    """Text that may be shortened, ascending. All else is protected."""
    question: str | None = None
    """What is asked about it; None where that isn't known yet."""
    text: Callable[[Sequence[int]], str] = _no_text
    """The words of some ids."""
    max_tokens: int = 0
    """Tokens that will be generated behind it at most."""
    known: int = 0
    """Tokens at the beginning whose cells are known as long as they stay."""


@dataclass(frozen=True, slots=True)
class PromptEdit:
    """A prompt after an editor: a subsequence of its ids."""

    ids: Sequence[int]
    keep_map: Sequence[int]
    """For each of `ids` the place that it had, ascending."""
    protected: Sequence[Range]
    """What was not the editor's to touch, as spans of the new `ids`."""
    why: str = ""
    """Why the editor left the prompt as it was; empty if it didn't."""


class PromptEditor(Bound):
    """The prompt/ part of a method: what the tokens are. It runs once a prompt, before admission."""

    def edit(self, req: PromptIds, score: Scorer) -> PromptEdit:
        """Only tokens of `req.context`, which is never empty here, may go. Its time is part of TTFT."""
        return PromptEdit(req.ids, range(len(req.ids)), [(0, len(req.ids))])


class Linears(Protocol):
    """Prepared linear layers: how a model multiplies by its weights."""

    def __call__(self, name: str, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x [n, I] (+ add [n, O]) -> [n, O]."""
        ...
