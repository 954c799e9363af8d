"""Reading lineage back: which episodes trained a version, which versions learned from an episode, what a step drew.

    version 12 -> manifest -> parent 11 -> ... -> 0        `ancestry`
        |             |
        |             +-> lineage.arrow.zst                `read_lineage`: draws per step, episodes new to it
        +-> everything that it learned from                the union along the ancestry

Everything is read from the store alone, so it works on a run of any age and while it runs.
"""

from collections.abc import Iterator

from sop.broadcast import PolicyManifest, fetch_manifest, published_versions
from sop.broadcast.manifest import BASE_VERSION
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.lineage import Lineage, StepDraw
from sop.transport import ObjectStore


def read_lineage(store: ObjectStore, manifest: PolicyManifest) -> Lineage:
    """What a version learned since its parent; empty when its manifest names none (blocking).

    Raises:
        InvalidRecord: the stored lineage is missing or is not the one that the manifest names.
        StoreUnavailable: no answer.
    """
    file = manifest.lineage
    if file is None:
        return Lineage(draws=(), learned=())
    try:
        data = store.get(file.key, slice(0, file.num_bytes + 1))
    except NotFound as error:
        raise InvalidRecord("lineage", f"policy {manifest.version} names {file.key}, which is not there") from error
    if content_hash(data) != file.hash:
        raise InvalidRecord("lineage", f"{file.key} is altered: its hash is {content_hash(data)}, not {file.hash}")
    return Lineage.decode(data)


def ancestry(store: ObjectStore, version: int) -> Iterator[PolicyManifest]:
    """Manifests from a version to the base, along the parents (blocking, one read per version).

    Raises:
        NotFound: the version, or one of its ancestors, is not published.
    """
    following: int | None = version
    while following is not None:
        manifest = fetch_manifest(store, following)
        yield manifest
        following = manifest.parent_version


def learned_by(store: ObjectStore, version: int) -> Iterator[tuple[PolicyManifest, Lineage]]:
    """The ancestry of a version with what each ancestor added, newest first (blocking)."""
    for manifest in ancestry(store, version):
        yield manifest, read_lineage(store, manifest)


def find_draw(store: ObjectStore, learner_step: int, version: int | None = None) -> tuple[PolicyManifest, StepDraw]:
    """The version that learned in a step, and the draw of that step (blocking).

    Args:
        store: of the run.
        learner_step: 1 is the learner's first.
        version: look in this version only, 0 for the steps of pretraining, which have numbers of their own; None looks
            along the ancestry of the newest one, without the base.

    Raises:
        RunError: no published version has the step; says up to where they have learned.
        NotFound: the version is not published.
    """
    if version is not None:
        manifests: Iterator[PolicyManifest] = iter([fetch_manifest(store, version)])
    else:
        newest = max(published_versions(store), default=BASE_VERSION)
        manifests = (manifest for manifest in ancestry(store, newest) if manifest.version != BASE_VERSION)
    newest_step, found = 0, None
    for manifest in manifests:
        newest_step = max(newest_step, manifest.learner_step)
        if learner_step > manifest.learner_step:
            break
        found = manifest  # the oldest that has learned up to the step is the one that learned in it
    draw = None if found is None else read_lineage(store, found).draw(learner_step)
    if found is None or draw is None:
        raise RunError(
            f"step {learner_step} is in no published version: those there are have learned up to {newest_step}"
        )
    return found, draw
