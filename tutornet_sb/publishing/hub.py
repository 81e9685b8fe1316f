"""An exported folder on the Hugging Face hub."""

import json
import re
import sys
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

from tutornet_sb.networks.export_folder import CONFIG, read_config
from tutornet_sb.publishing.model_card import (
    FILES,
    OPTIONAL,
    README,
    model_card,
)
from tutornet_sb.util.errors import InputError, one_line
from tutornet_sb.util.redaction import hide_secrets

MAIN = "main"
# Seconds without an answer; the client itself would wait for ever.
TIMEOUT = 60
NO_ANSWER = httpx2.TransportError, httpx2.InvalidURL, ConnectionError
# Where the answer is that of another server
NO_ANSWER = *NO_ANSWER, json.JSONDecodeError, KeyError
# Errors of the client, besides its own HfHubHTTPError
FAILURES = *NO_ANSWER, OSError, ValueError, RuntimeError
AGAIN = (
    "run the same command again; files that are uploaded already are not sent "
    "again"
)


class Upload(NamedTuple):
    """What is to be published: by name, paths of files and the card's bytes.

    ``name`` is the repository, ``owner/model``, at ``url``.
    """

    name: str
    branch: str
    url: str
    contents: dict

    @property
    def sizes(self):
        """Bytes by name, in order."""
        return {
            name: len(file) if name == README else file.stat().st_size
            for name, file in sorted(self.contents.items())
        }


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
    config = read_config(folder)
    license = license or config.get("license")
    if license is None:
        raise InputError(
            f"the corpus of {folder} names no licence: give --license, for "
            "instance --license cc-by-4.0"
        )
    options = {"license": license, "language": language, "private": private}
    options["revision"] = None if revision == MAIN else revision
    try:
        card = model_card(config, folder, name, **options)
    # Made-up values raise errors of all kinds.
    except Exception as error:
        raise InputError(
            f"{folder / CONFIG} is damaged, and no model card can be made of "
            f"it ({type(error).__name__}: {error}): export the run again"
        ) from None
    url = hide_secrets(f"{HfApi().endpoint}/{name}")
    contents = _find_files(folder) | {README: card.encode()}
    return Upload(name, revision or MAIN, url, contents)


def publish(folder, name, private=False, message=None, **options):
    """Publish an exported model on the Hugging Face hub, in one commit.

    The arguments are those of ``tutornet publish``, whose help describes them.
    After a failure the same call continues: huggingface_hub does not send again
    what is uploaded already, and makes no commit if nothing has changed.

    Returns the ``Upload``, the commit, and whether anything was new. Raises
    InputError if the folder is no sound export, an argument is invalid, or the
    hub does not take the model.
    """
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
            raise InputError(hide_secrets(reason)) from None
    return upload, commit.oid, commit.oid != head.sha


def _find_files(folder):
    """Files by name in the repository; foreign files and links are refused."""
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
    strays = [
        name
        for name, path in found.items()
        if path.is_symlink() or name not in (*FILES, README)
    ]
    if strays:
        raise InputError(
            f"{folder} holds what no export writes: {', '.join(strays)}. Move "
            "it elsewhere, or export the run again"
        )
    missing = [name for name in FILES if name not in {*found, *OPTIONAL}]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}: export the run again"
        )
    return found


def _find_token():
    token = get_token()
    # Errors about any other sign would show it.
    if token is None or not re.fullmatch("[!-~]+", token):
        raise InputError(
            "the hub needs a token, and one without spaces or accents: log in "
            "by `hf auth login`, or set HF_TOKEN"
        )
    return token


@contextmanager
def _client_settings():
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
    return [
        *(
            CommitOperationAdd(name, file)
            for name, file in upload.contents.items()
        ),
        *(
            CommitOperationDelete(sibling.rfilename)
            for sibling in head.siblings or ()
            if sibling.rfilename in FILES
            and sibling.rfilename not in upload.contents
        ),
    ]


def _explain(error, name, endpoint):
    """The client's reason, and the remedy where users can do something."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        # "Error while uploading"
        error = error.__cause__
    said = getattr(error, "server_message", None) or one_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to publish"
    if isinstance(error, NO_ANSWER) and status is None:
        return (
            f"{endpoint} cannot be reached, or is no hub ({said}): check the "
            f"connection, and HF_ENDPOINT if it is set. Then {AGAIN}"
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
