"""Pushing a folder to the Hugging Face Hub: the only thing here that uses the network."""

import os
from pathlib import Path

from personas_tune.errors import ConfigError, ServerError

TOKEN = "HF_TOKEN"


def require_token() -> str:
    """The Hub's token, from the environment only.

    Raises:
        ConfigError: If it isn't set.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ConfigError(
            f"{TOKEN} is not set", where="export.push_to", remedy=f"export {TOKEN}=... with a token that may write"
        )
    return token


def push_folder(folder: Path, repo_id: str, *, token: str, private: bool, message: str) -> str:
    """Make a model repository's files those of a folder, in one commit; it is made if it isn't there.

    Files that the repository has already are not sent again. Others are deleted: what is left of another form, such
    as an ``adapter_config.json`` beside merged weights, would be loaded in its place.

    Args:
        folder: What to upload.
        repo_id: ``owner/name``.
        token: From :func:`require_token`.
        private: Whether a repository that is made is private; one that is there stays as it is.
        message: Of the commit.

    Returns:
        The repository's address.

    Raises:
        ServerError: If the Hub can't be reached or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        url = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, repo_type="model", commit_message=message, delete_patterns="*"
        )
    except Exception as error:  # the Hub's HTTP library is another one in each major version
        reason = " ".join(str(error).split()).replace(token, "...") or type(error).__name__
        raise ServerError(
            f"can't be pushed ({reason})",
            where=f"export.push_to {repo_id}",
            remedy=f"check the name, {TOKEN} and the connection; a run without export.push_to stays here",
        ) from error
    return str(url)
