"""Reading published policies from the store: by listing, one manifest, its tensors."""

import re
from collections.abc import Iterator

from sop.broadcast.manifest import MAX_MANIFEST_BYTES, PolicyManifest
from sop.broadcast.weights import check_encoding, read_weights
from sop.core import layout
from sop.core.errors import InvalidRecord, PolicyRefused
from sop.core.policy import Weights
from sop.transport.base import ObjectStore

_MANIFEST_KEY = re.compile(rf"{layout.POLICIES}/(\d{{8}})/manifest\.json")


def published_versions(store: ObjectStore, after: int | None = None) -> Iterator[int]:
    """Versions that have a manifest, ascending, above `after`. Lists the store: blocks.

    Raises:
        StoreUnavailable: no answer, also in the middle of the iteration.
    """
    start = None if after is None else layout.policy_manifest(after)
    for key in store.keys(f"{layout.POLICIES}/", start):
        if match := _MANIFEST_KEY.fullmatch(key):
            yield int(match[1])


def fetch_manifest(store: ObjectStore, version: int) -> PolicyManifest:
    """The manifest of a published policy, checked. Blocks.

    Raises:
        NotFound: the version is not published (yet).
        InvalidRecord: the manifest is not valid, or is that of another version.
        StoreUnavailable: no answer; the same call may work later.
    """
    manifest = PolicyManifest.from_json(store.get(layout.policy_manifest(version), slice(0, MAX_MANIFEST_BYTES + 1)))
    if manifest.version != version:
        raise InvalidRecord("version", f"the manifest of policy {version} says it is policy {manifest.version}")
    return manifest


def fetch_weights(store: ObjectStore, manifest: PolicyManifest) -> Weights:
    """The tensors of a published policy as read-only arrays, every byte verified. Blocks for the transfer.

    Raises:
        NotFound: the tensors were deleted by retention.
        PolicyRefused: encoding unknown, or the tensors are not exactly those of the manifest.
        StoreUnavailable: no answer; the same call may work later.
    """
    check_encoding(manifest)
    if len(manifest.files) != 1:
        raise PolicyRefused(f"policy {manifest.version}: {len(manifest.files)} files, expected one")
    (file,) = manifest.files
    return read_weights(store.get(file.key, slice(0, file.num_bytes + 1)), manifest)


def fetch_policy(store: ObjectStore, version: int) -> tuple[PolicyManifest, Weights]:
    """A published policy by its number, for evaluation and for a learner that starts from it. Blocks.

    Raises:
        NotFound, InvalidRecord, PolicyRefused, StoreUnavailable: as `fetch_manifest` and `fetch_weights`.
    """
    manifest = fetch_manifest(store, version)
    return manifest, fetch_weights(store, manifest)
