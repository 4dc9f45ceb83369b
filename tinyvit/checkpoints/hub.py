"""Checkpoints by name from the Hugging Face hub: `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION`.

`huggingface_hub` fetches them into its own cache, continues broken downloads, shows how far they are, and follows its
environment variables: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

from __future__ import annotations

from pathlib import Path

from tinyvit.checkpoints.checkpoint import CheckpointError

PREFIX = "hf:"
SETTINGS = ["config.json", "preprocessor_config.json"]
# The weights, in one file or in several; the first kind that is there is taken.
WEIGHTS = (
    ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"],
)


def fetch(name: str) -> Path:
    """The directory that holds a checkpoint of the hub, fetched where it is not in the cache.

    Args:
        name: "hf:OWNER/NAME", with "@REVISION" for a branch, a tag or a commit other than the newest.

    Raises:
        CheckpointError: the extra is missing, the name is none, or the hub does not give the files; it names the cure.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(f'{name}: models of the hub need huggingface_hub: pip install "tinyvit[hub]"') from None
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        for weights in WEIGHTS:
            folder = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=[*SETTINGS, *weights])
            )
            if any(any(folder.glob(pattern)) for pattern in weights):
                return folder
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is not in the cache, and the hub cannot be reached: connect, or unset HF_HUB_OFFLINE"
        ) from None
    except GatedRepoError:
        raise CheckpointError(
            f"{name}: its owner asks for consent: accept the terms on its page, and set HF_TOKEN"
        ) from None
    except Exception as error:  # the library's own and those of its HTTP client, which have no common class
        raise CheckpointError(f"{name}: {str(error) or type(error).__name__}") from None
    raise CheckpointError(f"{name}: it has no weights that are named {WEIGHTS[0][0]} or {WEIGHTS[1][0]}")
