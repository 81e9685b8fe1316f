"""Messages of others without tokens and passwords."""

import logging
import re

# At DEBUG they log the headers of answers, which may repeat the token.
HTTP_CLIENTS = "httpcore", "httpcore2", "httpx", "httpx2", "urllib3"


def mute_http_clients():
    """Keep headers out of a program's logs; to be called by programs alone."""
    for name in HTTP_CLIENTS:
        logging.getLogger(name).setLevel(logging.INFO)


def hide_secrets(text):
    """Take the hub's token, and passwords in addresses, out of a text.

    A server may repeat what it was sent, and a client where it sent it.

    Example
    -------
    >>> hide_secrets("http://me:secret@hub.example/x is not there")
    'http://hub.example/x is not there'
    """
    # Takes long to import
    from huggingface_hub import errors, get_token

    text = re.sub(r"//[^/\s@]+@", "//", text)
    try:
        token = get_token()
    except (errors.OIDCError, errors.DeviceCodeError):
        token = None
    return text.replace(token, "<token>") if token else text
