"""Names of the folders of runs: another teacher makes another folder."""

import hashlib
import re
from pathlib import Path


def name_teacher(
    network,
    size,
    usual_size,
    folder=None,
    source=None,
    revision=None,
    kind=None,
):
    """Name a teacher in the folder of a run, by the settings of ``teacher``.

    By the file of its network, with a size that is not the usual one; or by
    its folder or source, with the beginning of a checksum.

    Example
    -------
    >>> name_teacher("hparams/models/jasper_dr.yaml", "full", "small")
    'jasper_dr_full'
    >>> source = "facebook/wav2vec2-base-960h"
    >>> name_teacher("", "", "", source=source, revision="main")
    'wav2vec2-base-960h-2dbb26'
    """
    if source is None and folder is None:
        name = Path(network).stem
        return name if size == usual_size else f"{name}_{size}"
    where = source or folder
    # The last part of a run's folder is its seed.
    parts = [part for part in Path(where).parts if not part.isdigit()]
    readable = re.sub(r"[^\w.+=-]+", "-", parts[-1] if parts else "teacher")
    identity = repr([where, revision, kind] if source else where)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return f"{readable.removeprefix('teacher_')}-{digest[:6]}"


def name_run(stages, student, teacher):
    """Name a run by its method, its student and its teacher if it has one.

    Example
    -------
    >>> name_run(["rkd", "skd"], "lstm", "jasper_dr")
    'rkd+skd_lstm_by_jasper_dr'
    >>> name_run(["ctc"], "lstm", "jasper_dr")
    'ctc_lstm'
    """
    by = "" if list(stages) == ["ctc"] else f"_by_{teacher}"
    return f"{'+'.join(stages)}_{student}{by}"
