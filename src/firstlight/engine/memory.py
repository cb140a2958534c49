"""How much memory there is, and how many KV blocks that makes."""

from __future__ import annotations

from pathlib import Path

from firstlight.core.config import Options, format_bytes, parse_bytes
from firstlight.core.errors import UserError

_SHARE = 0.6
"""Of what is free, KV takes at most this much by default."""


def available_bytes() -> int:
    """Memory that this process may still take, as the kernel and the control group say."""
    left = [_meminfo()]
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, used = _number(limit), _number(usage)
        if allowed is not None and used is not None:
            left.append(max(allowed - used, 0))
    return min(left)


def num_blocks(options: Options, max_model_len: int, blocks_per_column: int, block_nbytes: int, block: int) -> int:
    """Blocks of the pool. Raises UserError, with both figures, on a budget that cannot work."""
    column_nbytes = blocks_per_column * block_nbytes
    free = available_bytes()
    given = parse_bytes(options.kv_memory)
    if given is not None and given > free:
        raise UserError(
            f"--kv-memory {options.kv_memory} needs {format_bytes(given)}, {format_bytes(free)} is available"
        )
    wanted = (-(-max_model_len // block) + 1) * options.max_num_seqs * column_nbytes
    budget = given if given is not None else min(wanted, int(_SHARE * free))
    if budget < 2 * column_nbytes:
        need = format_bytes(2 * column_nbytes)
        raise UserError(f"KV needs {need} at least, {format_bytes(budget)} is available; give more with --kv-memory")
    return budget // column_nbytes * blocks_per_column


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
