"""Reading lineage back: which episodes trained a version, which versions learned from an episode, what a step drew.

    version 12 -> manifest -> parent 11 -> ... -> 0        `ancestry`
        |             |
        |             +-> lineage.arrow.zst                `read_lineage`: draws per step, episodes new to it
        +-> everything that it learned from                the union along the ancestry

Everything is read from the store alone, so it works on a run of any age and while it runs.
"""

from collections.abc import Iterator

from sop.broadcast import PolicyManifest, fetch_manifest, published_versions
from sop.core.codec import content_hash
from sop.core.errors import InvalidRecord, NotFound, RunError
from sop.core.lineage import Lineage, StepDraw
from sop.transport import ObjectStore

BASE_VERSION = 0


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
        learner_step: 1 is the learner's first; the steps of pretraining have their own numbers, in version 0.
        version: look in this version only; None looks along the ancestry of the newest one, the base last.

    Raises:
        RunError: no published version has the step; says which steps there are.
    """
    if version is not None:
        manifests: Iterator[PolicyManifest] = iter([fetch_manifest(store, version)])
    else:
        versions = list(published_versions(store))
        if not versions:
            raise RunError("no policy is published, so no step is recorded yet")
        manifests = ancestry(store, versions[-1])
    steps: list[int] = []
    for manifest in manifests:
        if manifest.version == BASE_VERSION or learner_step <= manifest.learner_step:
            lineage = read_lineage(store, manifest)
            if (draw := lineage.draw(learner_step)) is not None:
                return manifest, draw
            steps += [draw.learner_step for draw in lineage.draws]
        steps.append(manifest.learner_step)
    there = f"{min(steps)} to {max(steps)}" if steps else "none"
    raise RunError(f"step {learner_step} is in no published version; recorded steps: {there}")
