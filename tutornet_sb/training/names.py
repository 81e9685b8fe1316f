"""Names of the folders of runs, such that another teacher is another folder."""

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
    """Name a teacher in the folder of a run.

    Used as ``teacher_name: !applyref:tutornet_sb.training.names.name_teacher``.

    Arguments
    ---------
    network : str
        ``teacher_yaml``, the file of its network.
    size : str
        ``teacher_size``.
    usual_size : str
        That of the corpus.
    folder : str, optional
        ``teacher_folder``, if it is given.
    source : str, optional
        ``teacher_source``, a folder or hub id; the network then counts for
        nothing.
    revision : str, optional
        ``teacher_revision``.
    kind : str, optional
        ``teacher_kind``.

    Returns
    -------
    str
        The name of the file, with a size that is not the usual one; or that of
        the folder or the source, with the beginning of a checksum.

    Example
    -------
    >>> name_teacher("hparams/models/jasper_dr.yaml", "small", "small")
    'jasper_dr'
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

    Used as ``run_name: !applyref:tutornet_sb.training.names.name_run``.

    Arguments
    ---------
    stages : list of str
        Such as ``[rkd, skd]``.
    student : str
        Name of the network.
    teacher : str
        Name of the teacher, which CTC alone does without.

    Returns
    -------
    str
        ``STAGES_STUDENT_by_TEACHER``.

    Example
    -------
    >>> name_run(["rkd", "skd"], "lstm", "jasper_dr")
    'rkd+skd_lstm_by_jasper_dr'
    >>> name_run(["ctc"], "lstm", "jasper_dr")
    'ctc_lstm'
    """
    by = "" if list(stages) == ["ctc"] else f"_by_{teacher}"
    return f"{'+'.join(stages)}_{student}{by}"
