"""Models by hub id: `org/name` is a safetensors model, `org/name/file.gguf` a GGUF file, fetched when first used.

Nothing here runs unless such an id is given. The files live in the hub's own cache, shared with other programs, and are
found there when the network isn't.
"""

from __future__ import annotations

import re
from pathlib import Path

from firstlight.core.errors import UserError
from firstlight.models.weights.split import all_shards

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./+-]+\.gguf))?", re.ASCII)
_MODEL_FILES = ["*.json", "*.jinja", "model*.safetensors", "README.md"]  # README.md names the license


def is_hub_id(model: str) -> bool:
    """Whether a name can be a hub id: it has the form of one, and isn't a path that somebody mistyped."""
    match = _ID.fullmatch(model)
    return match is not None and not match[1].endswith(".gguf") and not model.startswith(".") and ".." not in model


def fetch(model: str) -> Path:
    """The directory or the GGUF file of a hub id, fetched as far as it isn't here. UserError if it cannot be had."""
    match = _ID.fullmatch(model)
    assert match is not None
    repo, file = match[1], match[2]
    folder = _snapshot(repo, all_shards(file) if file else _MODEL_FILES)
    if file:
        return _existing(folder / file, f"{repo} has no file {file}; check the name")
    if not (folder / "config.json").exists():
        raise UserError(f"{repo} holds no config.json; for a GGUF file of it give {repo}/FILE.gguf")
    return folder


def _existing(path: Path, message: str) -> Path:
    if not path.exists():
        raise UserError(message)
    return path


def _snapshot(repo: str, patterns: list[str]) -> Path:
    """The hub's own download of the files that match; what it raises is said in one line."""
    import huggingface_hub  # half a second that nobody else should wait for
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UserError(f"{repo} wants its terms accepted on the hub first; accept them there, then log in") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"no model {repo!r}: neither on this machine nor on the hub; check the name") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{repo} is not on this machine and the hub cannot be reached; check the network, or give a path or a "
            "name from `firstlight models list`"
        ) from None
    except Exception as error:  # the network's many ways to fail, each with its own class
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{repo} could not be fetched from the hub ({reason}); try again") from None
