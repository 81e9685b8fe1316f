"""Lines of ``results.csv``: what is known of runs and what they gain."""

import statistics

from tutornet_sb.experiments.groups import (
    COMPUTE_MATCHED,
    EQUAL_EPOCHS,
    FIRST,
    RATES,
)
from tutornet_sb.experiments.labels import place_of
from tutornet_sb.experiments.plan import total_seconds
from tutornet_sb.experiments.statistics import (
    SEEDS_FOR_A_CLAIM,
    difference,
    holm,
    interval,
)


def make_rows(groups, missing):
    """Rows of all groups and splits, and the number of tests in them.

    What a group lacks is added to ``missing``, by :func:`miss`.
    """
    rows = [*_teacher_rows(groups)]
    for found in groups:
        rows += _rows(found, missing)
    keys = [f"{kind}p_value" for kind in (EQUAL_EPOCHS, COMPUTE_MATCHED, FIRST)]
    tests = [
        (row, key) for row in rows for key in keys if row.get(key) is not None
    ]
    corrected = holm([row[key] for row, key in tests])
    for (row, key), value in zip(tests, corrected, strict=True):
        row[f"{key}_holm"] = value
    return rows, len(tests)


def miss(missing, what, found):
    """Note that a group lacks something."""
    missing.setdefault(what, {})[f"{found.label} on {found.corpus}"] = None


def _rows(found, missing):
    """Lines of results.csv, one for each split."""
    total = statistics.mean(map(total_seconds, found.results))
    teachers = [
        total_seconds(run) - run["train_seconds"] for run in found.results
    ]
    shared = {
        "corpus": found.corpus,
        "run": found.name,
        "label": found.label + " (1 seed)" * (len(found.seeds) == 1),
        "role": found.role,
        "network": found.network,
        "method": found.method,
        "teacher": found.teacher.get("name"),
        "teacher_sha256": found.teacher.get("weights_sha256"),
        "epochs": found.epochs,
        "seeds": " ".join(map(str, found.seeds)),
        "parameters": found.parameters,
        "million_parameters": found.parameters / 1e6,
        "mb": 4 * found.parameters / 1e6,
        "real_time_factor": found.mean("real_time_factor"),
        "steps": found.steps(),
        "seconds": found.mean("train_seconds"),
        "teacher_seconds": statistics.mean(teachers),
        "total_seconds": total,
    }
    if quarters := found.quarters():
        shared["dev_wer_before"], shared["dev_wer_last_quarter"] = quarters
        shared["dev_wer_gain"] = quarters[0] - quarters[1]
    if errors := found.rkd_errors():
        shared["rkd_error_first"], shared["rkd_error_last"] = errors
    if shared["steps"] is None:
        miss(missing, "steps of the optimizer", found)
    if found.role == "student" and EQUAL_EPOCHS not in found.references:
        what = "CTC baseline with as many epochs and seeds (one, or several)"
        miss(missing, what, found)
    if found.teacher and shared["teacher_sha256"] is None:
        miss(missing, "SHA-256 of the teacher's weights", found)
    for split in found.splits[0]:
        theirs = found.teacher.get("splits", {}).get(split, {})
        row = shared | {"split": split, "teacher_wer": theirs.get("wer")}
        for rate in RATES:
            row |= _rate(found, split, rate, missing)
        for kind, reference in found.references.items():
            gain = _gain(found, reference, split)
            row |= {f"{kind}{key}": value for key, value in gain.items()}
        yield row


def _teacher_rows(groups):
    """Lines for teachers whose runs are not among those of the report."""
    known = {
        (found.corpus, place) for found in groups for place in found.places
    }
    for found in groups:
        teacher = found.teacher
        key = found.corpus, place_of(teacher.get("source", ""))
        if not teacher or key in known:
            continue
        known.add(key)
        is_run = teacher["kind"] == "run"
        shared = {
            "corpus": found.corpus,
            "run": "/".join(key[1]) if is_run else teacher["name"],
            "label": f"teacher {teacher['name']}" + " (1 seed)" * is_run,
            "role": "teacher",
            "network": teacher["name"],
            "seeds": str(teacher.get("seed", "")),
            "million_parameters": teacher["parameters"] / 1e6,
            "mb": 4 * teacher["parameters"] / 1e6,
            "seconds": teacher.get("train_seconds"),
            "total_seconds": teacher.get("train_seconds"),
        }
        for same in ("method", "epochs", "parameters", "real_time_factor"):
            shared[same] = teacher.get(same)
        # Of a model that is no run nothing is known but its size.
        for split, scores in (teacher.get("splits") or {"": {}}).items():
            rates = {rate: scores.get(rate) for rate in RATES}
            yield shared | {"split": split} | rates


def _rate(found, split, rate, missing):
    """An error rate, its interval and its spread."""
    values, kept = found.rates(split, rate), found.errors(split, rate)
    if values is None:
        return {rate: None}
    row = {rate: statistics.mean(values)}
    row[f"{rate}_by_seed"] = " ".join(f"{value:.2f}" for value in values)
    if len(values) > 1:
        row[f"{rate}_sd"] = statistics.stdev(values)
    if kept is None:
        what = "errors of each utterance (errors.json)"
        miss(missing, what, found)
        return row
    errors, units, ids = kept
    row[f"{rate}_low"], row[f"{rate}_high"] = interval(errors, units)
    return row | {"utterances": len(ids)}


def _gain(found, reference, split):
    """What runs gain over others on the same utterances."""
    ours, theirs = found.rates(split, "wer"), reference.rates(split, "wer")
    seeds = min(len(found.seeds), len(reference.seeds))
    row = {
        "reference": reference.name,
        "reference_label": reference.label,
        "seeds_compared": seeds,
        "is_sufficient": seeds >= SEEDS_FOR_A_CLAIM,
    }
    if ours is None or theirs is None:
        return row
    made = statistics.mean(theirs)
    row["wer_difference"] = statistics.mean(ours) - made
    if made:
        row["wer_reduction"] = 100 * (1 - statistics.mean(ours) / made)
    by_seed = dict(zip(reference.seeds, theirs, strict=True))
    pairs = [
        (mine, by_seed[seed])
        for seed, mine in zip(found.seeds, ours, strict=True)
        if seed in by_seed
    ]
    if pairs:
        better = sum(mine < other for mine, other in pairs)
        row["seeds_better"] = f"{better} of {len(pairs)}"
    kept, others = found.errors(split, "wer"), reference.errors(split, "wer")
    if kept and others and kept[2] == others[2] and made:
        test = difference(kept[0], others[0], kept[1])
        row |= {
            "wer_difference_low": test.low,
            "wer_difference_high": test.high,
            "wer_reduction_low": test.reduction_low,
            "wer_reduction_high": test.reduction_high,
            "p_value": test.p_value,
        }
    return row | {"epochs_to_reach_it": found.epochs_to_reach(reference)}
