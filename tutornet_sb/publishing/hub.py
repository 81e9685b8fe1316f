"""An exported folder on the Hugging Face hub."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    errors,
    get_session,
    get_token,
    logging,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from tutornet_sb.networks import runs
from tutornet_sb.networks.export_folder import (
    CONFIG,
    SAFETENSORS,
    is_export,
    read_config,
)
from tutornet_sb.publishing.export import HYPERPARAMS, PRETRAINED_TOKENIZER
from tutornet_sb.publishing.licenses import check_license
from tutornet_sb.publishing.model_card import (
    FILES,
    README,
    file_sizes,
    model_card,
)
from tutornet_sb.util.errors import InputError, one_line
from tutornet_sb.util.redaction import hide_secrets

NEEDED = (
    CONFIG,
    HYPERPARAMS,
    SAFETENSORS,
    PRETRAINED_TOKENIZER,
    runs.WEIGHTS,
    runs.TOKENIZER,
)
MAIN = "main"
# A BCP 47 code: en, pt-BR
LANGUAGE = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*")
# Seconds without an answer; the client itself would wait for ever.
TIMEOUT = 60
UNREACHABLE = httpx2.TransportError, httpx2.InvalidURL, ConnectionError
# Errors of the client, besides its own HfHubHTTPError
FAILURES = (*UNREACHABLE, OSError, ValueError, RuntimeError, KeyError)
AGAIN = (
    "run the same command again; files that are uploaded already are not sent "
    "again"
)


class HubError(InputError):
    """The hub did not take a model; the message gives reason and remedy."""


class Upload(NamedTuple):
    """What is to be published: the card, and paths of other files by name.

    ``name`` is the repository, ``owner/model``, at ``url``.
    """

    name: str
    branch: str
    url: str
    card: str
    paths: dict

    @property
    def sizes(self):
        """Bytes by name, in order."""
        sizes = {name: path.stat().st_size for name, path in self.paths.items()}
        return dict(sorted((sizes | {README: len(self.card.encode())}).items()))


class Publication(NamedTuple):
    """What was published, its commit, and whether anything was new."""

    upload: Upload
    commit: str
    changed: bool


def prepare(
    folder, name, private=False, revision=None, license=None, language=None
):
    """Check and gather what :func:`publish` would send; nothing is sent."""
    folder = Path(folder)
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise InputError(str(error)) from None
    if "/" not in name:
        raise InputError(f"{name} lacks its owner: give OWNER/{name}")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"{revision} is a commit: name a branch")
    if not is_export(folder):
        raise InputError(
            f"{folder} is no exported model: make one by `tutornet export RUN "
            "DIR`"
        )
    config = read_config(folder)
    license = license or config.get("license")
    if license is None:
        raise InputError(
            f"the corpus of {folder} names no licence: give --license, for "
            "instance --license cc-by-4.0"
        )
    check_license(license)
    if language is not None and not LANGUAGE.fullmatch(language):
        raise InputError(
            f"language {language!r} is no BCP 47 code: give one like en or "
            "pt-BR"
        )
    try:
        card = model_card(
            config,
            folder,
            name,
            license=license,
            language=language,
            revision=None if revision == MAIN else revision,
            private=private,
        )
    # Made-up values raise errors of all kinds.
    except Exception as error:
        raise InputError(
            f"{folder / CONFIG} is damaged, and no model card can be made of "
            f"it ({type(error).__name__}: {error}): export the run again"
        ) from None
    return Upload(
        name,
        revision or MAIN,
        hide_secrets(f"{HfApi().endpoint}/{name}"),
        card,
        _find_files(folder),
    )


def publish(
    folder,
    name,
    private=False,
    revision=None,
    license=None,
    language=None,
    message=None,
):
    """Publish an exported model on the Hugging Face hub, in one commit.

    After a failure the same call continues: huggingface_hub does not send again
    what is uploaded already, and makes no commit if nothing has changed.

    Arguments
    ---------
    folder : str or pathlib.Path
        Written by ``tutornet export``.
    name : str
        Repository, ``owner/model``; created if missing.
    private : bool
        Create it as private.
    revision : str, optional
        Branch, by default the main one; created if missing.
    license : str, optional
        Licence of the model, by its name on the hub; by default that of the
        export.
    language : str, optional
        Language of the speech, a BCP 47 code; by default that of the export.
    message : str, optional
        Of the commit.

    Returns
    -------
    Publication

    Raises
    ------
    InputError
        If the folder is no sound export, or an argument is invalid.
    HubError
        If the hub does not take it.
    """
    options = {"license": license, "language": language, "revision": revision}
    upload = prepare(folder, name, private, **options)
    api = HfApi(
        token=_find_token(),
        library_name="tutornet_sb",
        library_version=version("tutornet-sb"),
    )
    with _client_settings():
        try:
            head = _find_head(api, upload, private)
            if head.private and not private:
                # Its card loads it with a token.
                upload = prepare(folder, name, private=True, **options)
            commit = api.create_commit(
                name,
                _operations(upload, head),
                commit_message=message or f"Publish {name.partition('/')[2]}",
                revision=upload.branch,
                parent_commit=head.sha,
            )
        except InputError:
            raise
        except FAILURES as error:
            reason = _explain(error, name, api.endpoint)
            raise HubError(hide_secrets(reason)) from None
    return Publication(upload, commit.oid, commit.oid != head.sha)


def _find_files(folder):
    """Files by name in the repository; foreign files and links are refused."""
    sizes = file_sizes(folder)
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink()]
    if links:
        raise InputError(
            f"{links[0]} is a link: replace it by its file, or export the run "
            "again"
        )
    strays = [name for name in sizes if name not in FILES and name != README]
    if strays:
        raise InputError(
            f"{folder} holds what no export writes: {', '.join(strays)}. Move "
            "it elsewhere, or export the run again"
        )
    missing = [name for name in NEEDED if name not in sizes]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}: export the run again"
        )
    return {name: folder / name for name in sizes if name != README}


def _find_token():
    token = get_token()
    if token is None:
        raise HubError(
            "the hub needs a token: log in by `hf auth login`, or set HF_TOKEN"
        )
    if not re.fullmatch("[!-~]+", token):
        # Errors about it would show it.
        raise HubError(
            "the token of the hub has invalid characters: log in again by `hf "
            "auth login`, or set HF_TOKEN anew"
        )
    return token


@contextmanager
def _client_settings() -> Iterator[None]:
    """Limit the wait for answers; no warnings, progress in terminals only."""
    session, verbosity = get_session(), logging.get_verbosity()
    timeout, session.timeout = session.timeout, TIMEOUT
    logging.set_verbosity(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)
        session.timeout = timeout


def _find_head(api, upload, private):
    """The branch on the hub; repository and branch are created if missing."""
    name, branch = upload.name, upload.branch
    api.create_repo(name, private=private, exist_ok=True)
    if branch != MAIN:
        api.create_branch(name, branch=branch, exist_ok=True)
    head = api.repo_info(name, revision=branch, timeout=TIMEOUT)
    if private and not head.private:
        raise InputError(
            f"{name} exists and is public, and --private is for a new one: "
            "choose another name, or make it private in its settings on the hub"
        )
    return head


def _operations(upload, head):
    """Add all files; delete those that only an earlier export had."""
    contents = {README: upload.card.encode(), **upload.paths}
    return [
        *(CommitOperationAdd(name, file) for name, file in contents.items()),
        *(
            CommitOperationDelete(sibling.rfilename)
            for sibling in head.siblings or ()
            if sibling.rfilename in FILES and sibling.rfilename not in contents
        ),
    ]


def _explain(error, name, endpoint):
    """The client's reason, and the remedy where users can do something."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        # "Error while uploading"
        error = error.__cause__
    said = getattr(error, "server_message", None) or one_line(error)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to publish"
    if isinstance(error, UNREACHABLE) and status is None:
        return (
            f"{endpoint} cannot be reached ({said}): check the connection, and "
            f"HF_ENDPOINT if it is set. Then {AGAIN}"
        )
    if isinstance(error, (json.JSONDecodeError, KeyError)):
        return (
            f"the answer of {endpoint} is not that of a hub ({said}): check "
            f"HF_ENDPOINT if it is set, else {AGAIN}"
        )
    if status == 401:
        return (
            "the hub does not accept the token (401): log in again by `hf auth "
            "login`, or set HF_TOKEN anew"
        )
    if status == 403:
        owner = name.partition("/")[0]
        return (
            f"the token may not do this (403) ({said}): {name} needs a token "
            f"with write access, of {owner} or a member; or choose another "
            "owner"
        )
    code = f" ({status})" if status else ""
    return f"publishing failed{code}: {said.rstrip('. ')}. To retry, {AGAIN}"
