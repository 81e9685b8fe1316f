"""An exported folder on the Hugging Face hub."""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    errors,
    get_session,
    get_token,
    logging,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from tutornet_sb.networks import runs
from tutornet_sb.networks.export_folder import CONFIG, SAFETENSORS
from tutornet_sb.publishing.export import (
    HYPERPARAMS,
    PRETRAINED_TOKENIZER,
    SOURCE,
    is_export,
)
from tutornet_sb.publishing.licenses import check_license
from tutornet_sb.publishing.model_card import (
    INT8,
    ONNX,
    README,
    SCRIPT,
    SHERPA,
    TOKENS,
    UNKNOWN,
    file_sizes,
    license_of,
    model_card,
)
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import read_json
from tutornet_sb.util.redaction import hide_secrets

NEEDED = (
    CONFIG,
    HYPERPARAMS,
    SAFETENSORS,
    PRETRAINED_TOKENIZER,
    runs.WEIGHTS,
    runs.TOKENIZER,
)
# All that an export may hold
OURS = (*NEEDED, README, SOURCE, ONNX, INT8, SCRIPT, SHERPA, TOKENS)
MAIN = "main"
# Seconds before each further try of what the client does not try again itself
WAITS = (1, 2, 4, 8)
LONGEST_WAIT = 60
# Seconds without an answer; the client itself would wait for ever.
TIMEOUT = 60
# What a failed request may raise, beside its own errors
FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    httpx2.HTTPError,
    httpx2.InvalidURL,
)


# How the client of the hub's store (hf_xet) words an answer
STORE_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
UNREACHABLE = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
    httpx2.InvalidURL,
)
REFUSALS = {
    401: "the hub does not accept the token (401): log in again by `hf auth "
    "login`, or set HF_TOKEN anew",
    403: "the token may not do this (403){said}: {name} needs one with the "
    "right to write, of somebody who may write there",
    404: "the hub has no {name} (404){said}, or it is not for this token to "
    "see: look at the name, then log in by `hf auth login`",
}


class HubError(InputError):
    """The hub did not take a model; the message says why and what to do."""


class Upload(NamedTuple):
    """What would go to the hub.

    Attributes
    ----------
    name : str
        Repository, ``owner/model``.
    branch : str
        Its branch.
    url : str
        Its address.
    card : str
        Text of its ``README.md``.
    paths : dict
        Path of each other file, by its name in the repository.
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
    """What has come to be on the hub.

    Attributes
    ----------
    upload : Upload
        The files.
    commit : str
        The commit that holds them.
    changed : bool
        False if the hub had held all of it before.
    """

    upload: Upload
    commit: str
    changed: bool


@dataclass
class _Progress:
    """What has happened so far.

    Attributes
    ----------
    made : list of str
        What was made for the commit.
    base : str or None
        Commit that the branch stood at before.
    is_uncertain : bool
        Whether a commit was sent and no answer came.
    is_tried_by_client : bool
        Whether the client is at what it tries again itself.
    is_committing : bool
        Whether the client is at the commit.
    """

    made: list = field(default_factory=list)
    base: str | None = None
    is_uncertain: bool = False
    is_tried_by_client: bool = False
    is_committing: bool = False


def prepare(
    folder, name, private=False, revision=None, license=None, language=None
):
    """Gather what would go to the hub; nothing is sent.

    Arguments
    ---------
    folder : str or pathlib.Path
        Written by ``tutornet export``.
    name : str
        Repository, ``owner/model``.
    private : bool
        Whether only those who log in may load the model.
    revision : str, optional
        Branch, by default the main one.
    license : str, optional
        Licence of the model, as the hub calls it; by default that of the
        export.
    language : str, optional
        Language of the speech, as an ISO 639 code; by default that of the
        export.

    Returns
    -------
    Upload
        The files.

    Raises
    ------
    ValueError
        If the folder is not what an export made, or an argument will not do.
    """
    folder = Path(folder)
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise InputError(str(error)) from None
    if "/" not in name:
        raise InputError(f"{name} lacks its owner: say OWNER/{name}")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"{revision} is a commit: name a branch")
    if not is_export(folder):
        raise InputError(
            f"{folder} is no exported model: make one by `tutornet export RUN "
            "DIR`"
        )
    config = read_json(folder / CONFIG)
    if license is None and license_of(config) == UNKNOWN:
        raise InputError(
            f"the licence of {folder} does not follow from its corpus: say "
            "--license, for instance --license cc-by-4.0"
        )
    check_license(license or license_of(config))
    if language is not None and not re.fullmatch("[a-z]{2,3}", language):
        raise InputError(
            f"language {language!r} is no ISO 639 code: give two or three "
            "small letters, as en"
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
    # Of what somebody made up, all kinds of errors
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
    """Put an exported model on the Hugging Face hub, in one commit.

    What is transient is tried again. A try begins with what the hub holds, so
    that a commit whose answer was lost is not made twice.

    Arguments
    ---------
    folder : str or pathlib.Path
        Written by ``tutornet export``.
    name : str
        Repository, ``owner/model``; it is made if there is none.
    private : bool
        Make it for its owner alone.
    revision : str, optional
        Branch, by default the main one; it is made if there is none.
    license : str, optional
        Licence of the model, as the hub calls it; by default that of the
        export.
    language : str, optional
        Language of the speech, as an ISO 639 code; by default that of the
        export.
    message : str, optional
        Of the commit.

    Returns
    -------
    Publication
        What is on the hub now.

    Raises
    ------
    ValueError
        If the folder is not what an export made, or an argument will not do.
    HubError
        If the hub does not take it.
    """
    gather = partial(
        prepare,
        folder,
        name,
        revision=revision,
        license=license,
        language=language,
    )
    gather(private=private)
    token = _find_token()
    api = HfApi(
        token=token,
        library_name="tutornet_sb",
        library_version=version("tutornet-sb"),
    )
    if message is None:
        message = f"Publish {name.partition('/')[2]}"
    progress = _Progress()
    with _quiet():
        for wait in (*WAITS, None):
            try:
                with _limited():
                    return _push(api, gather, private, message, progress)
            except FAILURES as error:
                problem = _explain(error, name, api.endpoint, progress)
            if wait is None or not problem.is_transient:
                break
            time.sleep(max(wait, problem.wait))
    reason = " ".join(f"{problem.reason}. {_what_is_left(progress)}".split())
    raise HubError(hide_secrets(reason))


def _find_files(folder):
    """Files by name in the repository; what no export wrote is refused."""
    names, strays = file_sizes(folder), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InputError(
                f"{path} is a link: put the file there that it points to, or "
                "export the run again"
            )
        if path.is_dir():
            continue
        if name not in OURS:
            strays.append(name)
    if strays:
        raise InputError(
            f"{folder} holds what no export writes: {', '.join(strays)}. Move "
            "it elsewhere, or export the run again"
        )
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}: export the run again"
        )
    return {name: folder / name for name in names if name != README}


def _find_token():
    """The token of huggingface_hub's usual places."""
    try:
        token = get_token()
    except (errors.OIDCError, errors.DeviceCodeError):
        token = None
    if token is None:
        raise HubError(
            "the hub needs to know you: log in by `hf auth login`, or set "
            "HF_TOKEN"
        )
    if not re.fullmatch("[!-~]+", token):
        # Errors about it would show it.
        raise HubError(
            "the token of the hub has characters that no token has: log in "
            "again by `hf auth login`, or set HF_TOKEN anew"
        )
    return token


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's warnings back: what is wrong is said once.

    Its progress is shown to who looks on, not to a file.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _limited() -> Iterator[None]:
    """Wait for answers for a limited time."""
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def _push(api, gather, private, message, progress):
    """Make one try, from what the hub holds now."""
    progress.is_committing = False
    upload = gather(private=private)
    head = _find_head(api, upload, private, progress)
    if progress.base is None:
        progress.base = head.sha
    if head.private != private:
        # To be loaded with a token, as the card says
        upload = gather(private=head.private)
    additions = [CommitOperationAdd(README, upload.card.encode())]
    additions += [
        CommitOperationAdd(path_in_repo, path)
        for path_in_repo, path in upload.paths.items()
    ]
    progress.is_tried_by_client = True
    api.preupload_lfs_files(
        upload.name, additions, revision=upload.branch, free_memory=False
    )
    progress.is_tried_by_client = False
    # Of an earlier publication, which had more files
    deletions = [
        CommitOperationDelete(sibling.rfilename)
        for sibling in head.siblings or ()
        if sibling.rfilename in OURS and sibling.rfilename not in upload.sizes
    ]
    progress.is_committing = True
    commit = api.create_commit(
        upload.name,
        [*additions, *deletions],
        commit_message=message,
        revision=upload.branch,
        parent_commit=head.sha,
    )
    return Publication(upload, commit.oid, commit.oid != progress.base)


def _find_head(api, upload, private, progress):
    """What the branch holds, which is made if it is missing."""
    name, branch = upload.name, upload.branch
    try:
        head = api.repo_info(name, revision=branch, timeout=TIMEOUT)
    except errors.RevisionNotFoundError:
        api.create_branch(name, branch=branch)
        progress.made.append(f"the branch {branch}")
        return api.repo_info(name, revision=branch, timeout=TIMEOUT)
    except errors.RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        # Asked first, so that nothing is made for a card that will not do.
        _check_card(upload.card)
        api.create_repo(name, private=private)
        progress.made.append("the repository")
        return _find_head(api, upload, private, progress)
    if private and not head.private:
        raise InputError(
            f"{name} is there and public, and --private is for one that is "
            "made: name another, or make it private in its settings on the hub"
        )
    return head


def _check_card(card):
    try:
        ModelCard(card).validate()
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        said = str(error)
        try:
            found = json.loads(said)["errors"]
            said = "; ".join(entry["message"] for entry in found)
        except (ValueError, KeyError, TypeError):
            # Not as the hub puts it, and for a person to read as it is
            pass
        raise InputError(f"the hub refuses the card: {said}") from None


class _Problem(NamedTuple):
    """What went wrong.

    Attributes
    ----------
    reason : str
        What, and the way on.
    is_transient : bool
        Whether another try may do.
    wait : float
        Seconds that the hub asks for before it.
    """

    reason: str
    is_transient: bool = False
    wait: float = 0.0


def _explain(error, name, endpoint, progress):
    """Say what an error of the client means to who publishes."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        # The client's "error while uploading"
        return _explain(error.__cause__, name, endpoint, progress)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _Problem("HF_HUB_OFFLINE is set: unset it to publish")
    status = _status(error)
    is_transient = status == 429 or (status or 0) >= 500 or _is_cut(error)
    # The commit begins with a question to which some errors are unreadable.
    is_transient |= _is_unreadable(error) and progress.is_committing
    if is_transient and progress.is_committing:
        # It may have been done for all we know.
        progress.is_uncertain |= _may_be_of_commit(error)
    is_transient &= not progress.is_tried_by_client
    if isinstance(error, UNREACHABLE):
        return _Problem(
            f"{endpoint} cannot be reached: look after the connection (and "
            "HF_ENDPOINT, if it is set), then run the same command again"
        )
    if _is_cut(error):
        return _Problem(
            f"the connection to {endpoint} was cut or gave no answer: run the "
            "same command again",
            is_transient,
        )
    if _is_unreadable(error):
        return _Problem(
            f"the answer of {endpoint} is not that of a hub: is HF_ENDPOINT "
            "right? If so, run the same command again later",
            is_transient,
        )
    if status is None:
        return _Problem(str(error).rstrip(". "))
    said = getattr(error, "server_message", None)
    said = f" ({said})" if said else ""
    if status in (409, 412):
        # Perhaps with our own commit, whose answer was lost
        return _Problem(
            f"{name} was changed by somebody else at the same time{said}: see "
            "what is there, then run the same command again",
            progress.is_uncertain,
        )
    if status == 429 or status >= 500:
        return _Problem(
            f"the hub is in trouble or too busy ({status}): run the same "
            "command again later",
            is_transient,
            _asked_wait(error),
        )
    return _Problem(
        REFUSALS.get(status, "the hub refuses this, {status}{said}").format(
            name=name, status=status, said=said
        )
    )


def _status(error):
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    found = STORE_STATUS.search(str(error))
    return int(found[1]) if found else None


def _is_cut(error):
    return (
        isinstance(error, (httpx2.TransportError, ConnectionError))
        and not isinstance(error, UNREACHABLE)
        and _status(error) is None
    )


def _is_unreadable(error):
    """Whether the client choked on an answer."""
    return isinstance(error, (json.JSONDecodeError, KeyError))


def _may_be_of_commit(error):
    try:
        return "/commit/" in error.request.url.path
    except (AttributeError, RuntimeError):
        # An unreadable answer does not say to what.
        return True


def _asked_wait(error):
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("retry-after", "")
    return min(int(asked), LONGEST_WAIT) if asked.isdigit() else 0.0


def _what_is_left(progress):
    if progress.is_uncertain:
        return (
            "Whether the commit has come about is not known; the same command "
            "finds out"
        )
    if progress.made:
        made = " and ".join(progress.made)
        return f"Made for it so far: {made}; nothing was put there yet"
    return "Nothing was changed there"
