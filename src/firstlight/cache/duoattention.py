"""`duoattention`, its cache part: of streaming heads only the first and the last tokens stay (arXiv 2410.10819).

Nothing is chosen while a prompt runs: which heads stream is known before, so the table takes their blocks as they are
written and frees those that have fallen behind, chunk by chunk. The other heads are never touched.
"""

from __future__ import annotations

from firstlight.core.calibration import Calibration
from firstlight.core.parts import Capability, ModelFacts, Retention, Streams
from firstlight.core.streaming import StreamingConfig, read_table, streaming_heads


class StreamingHeads(Retention):
    """The cache part. Shared columns would lack the middle of streaming heads, so none is published."""

    name = "duoattention"
    seam = "cache"
    Config = StreamingConfig
    scope = "step"
    capability = Capability(exact=False, alters_cells=False, prefix_stable=False, calibration=True)
    read_published = staticmethod(read_table)

    def __init__(self, config: StreamingConfig) -> None:
        self.config = config
        self._heads: list[list[bool]] = []

    def bind(self, model: ModelFacts, calibration: Calibration | None) -> None:
        self._heads = streaming_heads(self.config, model, calibration)

    def streams(self) -> Streams | None:
        """In mode `reference` a chunk reads `recent` tokens before its first row, beside it."""
        recent = self.config.recent + (self.config.mode == "reference")
        return Streams(self._heads, self.config.sink, recent)
