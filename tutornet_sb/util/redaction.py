"""Texts by others without what nobody else may read."""

import logging
import re

from huggingface_hub import errors, get_token

# SpeechBrain's log file of a run takes all that is said. These say the headers
# of answers, where a server may repeat the token.
for _name in ("httpcore", "httpcore2", "httpx", "httpx2", "urllib3"):
    logging.getLogger(_name).setLevel(logging.INFO)


def hide_secrets(text):
    """Take the hub's token, and passwords in addresses, out of a text.

    A server may well repeat what it was sent, and a client where it sent it.

    Arguments
    ---------
    text : str
        To be shown, such as the message of an error.

    Returns
    -------
    str
        The same without them.

    Example
    -------
    >>> hide_secrets("http://me:secret@hub.example/x is not there")
    'http://hub.example/x is not there'
    """
    text = re.sub(r"//[^/\s@]+@", "//", text)
    try:
        token = get_token()
    except (errors.OIDCError, errors.DeviceCodeError):
        token = None
    return text.replace(token, "<token>") if token else text


def first_line(error):
    r"""Tell an error in one line.

    Arguments
    ---------
    error : Exception
        Any.

    Returns
    -------
    str
        First line of its message, or its type if there is none.

    Example
    -------
    >>> first_line(ValueError("too long. Details:\n..."))
    'too long. Details:'
    """
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return hide_secrets(line)
