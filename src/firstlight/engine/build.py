"""From options and weights to an engine that is ready to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

from firstlight.attention.joined import joined
from firstlight.cache.digests import Digests
from firstlight.cache.pool import Pool
from firstlight.core.config import Options, as_method, int8_parts
from firstlight.core.errors import UserError
from firstlight.core.registry import make_parts, make_schedule
from firstlight.core.view import ViewConfig
from firstlight.engine.admission import Limits
from firstlight.engine.costs import measure as measure_costs
from firstlight.engine.engine import Engine
from firstlight.engine.eventlog import EventLog
from firstlight.engine.machine import Machine
from firstlight.engine.memory import num_blocks
from firstlight.engine.park import ParkStore
from firstlight.engine.planning import Planning
from firstlight.kernels.dispatch import advise, fastest
from firstlight.kernels.kv_layout import BLOCK, Int8Layout, KVLayout
from firstlight.kernels.native import processor
from firstlight.models.calibration import measure, remember, remembered
from firstlight.models.config import ModelConfig
from firstlight.models.decoder import Decoder, Weight
from firstlight.models.families import FAMILIES, build_model
from firstlight.reuse.prefix import PrefixCache

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
"""The type that weights come in, and that of activations."""


Keep = Callable[[str, Callable[[], Iterable[tuple[str, Tensor]]]], Mapping[str, Tensor]]
"""(layout, what makes the pieces) -> the pieces by name: made, or kept from an earlier start (weights/store.py)."""


def build_engine(
    config: ModelConfig, weights: Mapping[str, Weight], options: Options, digest: str, keep: Keep | None = None
) -> Engine:
    """An engine over a model's weights (in the options' precision). Raises UserError on settings that can't be.

    `weights` are read only where `keep` hasn't what is made of them.
    """
    ops = fastest(config.head_dim)
    advise(options.precision)
    if (max_len := options.max_model_len or config.max_context) > config.max_context:
        log.warning("max_model_len=%d is more than the model's context; it is %d now", max_len, config.max_context)
        max_len = config.max_context
    parts = make_parts(options.methods, config.facts(digest, machine_name(options), max_len))
    model = _model(config, weights, options, digest, keep or _unkept, ops, max_len)
    layout = Int8Layout if "kv" in int8_parts(options.precision) else KVLayout
    if options.deterministic and (broken := ops.dependent_linears(model.linears)):
        raise UserError(
            f"--deterministic can't hold: {', '.join(sorted(broken))} change bits with rows or threads; "
            "start a fresh process, so that the instruction set can be capped before the first operator"
        )
    column = config.num_layers * config.num_kv_heads
    block_nbytes = layout.block_nbytes(config.head_dim, model.dtype)
    total = num_blocks(options, max_len, column, block_nbytes, BLOCK)
    pool = Pool(total, config.head_dim, model.dtype, layout)
    names = {name for part in parts for name in part.capability.digests}
    planners = [part for part in parts if part.seam == "attention"]
    planner, looks = joined([part.impl for part in planners]), any(part.capability.looks for part in planners)
    costs = None
    if planner is not None and looks and not options.deterministic:
        costs = measure_costs(ops, config, planner, model.dtype, layout)
    planning = Planning(Digests(pool, sorted(names)), costs)
    method = as_method(options.schedule)
    view_config = ViewConfig(
        num_layers=config.num_layers,
        blocks_per_column=column,
        total_blocks=total,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=BLOCK,
        seed=options.seed,
        schedule={"name": method.name, "settings": dict(method.settings)},
    )
    return Engine(
        Machine(model, ops, ParkStore(), planning),
        pool,
        make_schedule(method, view_config),
        view_config,
        Limits(max_len, options.seed, options.deterministic, digest, model.windows, config.max_context),
        parts,
        PrefixCache(pool, BLOCK, os.urandom(16), model.windows) if options.prefix_cache == "on" else None,
        EventLog(options.event_log, view_config) if options.event_log else None,
    )


def machine_name(options: Options) -> str:
    """What a speed that was measured here holds for."""
    return f"{processor()}, {torch.get_num_threads()} threads, {options.precision}, {options.weights} weights"


def _model(
    config: ModelConfig,
    weights: Mapping[str, Weight],
    options: Options,
    digest: str,
    keep: Keep,
    ops: ModuleType,
    max_len: int,
) -> Decoder:
    family, int8 = FAMILIES[config.architecture], int8_parts(options.precision)
    has_linears = "linears" in int8
    if int8 and not torch.cpu._is_vnni_supported():
        raise UserError("--precision int8 needs a processor with 8-bit dot products (VNNI); choose bf16 or f32 here")

    def pieces() -> Iterator[tuple[str, Tensor]]:
        spread = _spread(config, weights, ops, digest) if has_linears else None
        return family.prepared(config, weights, ops, spread)

    layout = "blocks" if options.weights == "compact" else ops.layout(DTYPES[options.compute])
    if layout == "blocks" and not ops.READS_BLOCKS:
        raise UserError("--weights compact needs the compiled kernels, which this model can't have here; leave it out")
    made = keep(f"{'int8' if has_linears else options.compute}-{layout}", pieces)
    spread = _spread(config, weights, ops, digest) if "kv" in int8 else {}
    centres = [spread[f"{layer}.keys"] for layer in range(config.num_layers)] if spread else None
    return family(config, made, ops, served=max_len, int8=has_linears, centres=centres)


def _unkept(layout: str, pieces: Callable[[], Iterable[tuple[str, Tensor]]]) -> Mapping[str, Tensor]:
    return dict(pieces())


def _spread(config: ModelConfig, weights: Mapping[str, Weight], ops: ModuleType, digest: str) -> Mapping[str, Tensor]:
    """What int8 has to know of activations: measured once, on a model in bfloat16 that is gone afterwards."""
    spread = remembered(digest)
    if spread is None:
        spread = measure(build_model(config, weights, ops))
        remember(digest, spread)
    return spread
