"""Published policies for whoever trains or judges them: with an identity, only those that somebody vouches for.

Robots ask more (`sop.broadcast.vetting`: not banned, not older than what was seen, not expired). A learner that started
from a base policy that was exchanged in the store would sign what it makes of it.
"""

from sop.broadcast import PolicyManifest, fetch_policy, manifest_bytes
from sop.core import layout
from sop.core.channel import STATEMENT_TYPE, PolicyRef, PolicyStatement, decode_record
from sop.core.codec import content_hash
from sop.core.errors import NotFound, Untrusted
from sop.core.policy import Weights
from sop.runs import Run
from sop.transport import own_identity
from sop.trust import CANDIDATE, MAX_ENVELOPE_BYTES, TrustRoot


def fetch_vouched(run: Run, version: int) -> tuple[PolicyManifest, Weights]:
    """A published policy of a run. Blocks for the transfer.

    Raises:
        Untrusted: this process has a `trust.json`, and nobody who may has signed this version of this run.
        NotFound, InvalidRecord, PolicyRefused, StoreUnavailable: as `sop.broadcast.fetch_policy`.
    """
    identity = own_identity()
    if identity is not None and identity.trust.exists():
        _require_vouched(run, version, TrustRoot.load(identity.trust))
    return fetch_policy(run.store, version)


def _require_vouched(run: Run, version: int, root: TrustRoot) -> None:
    published = PolicyRef(version, content_hash(manifest_bytes(run.store, version)))
    try:
        envelope = run.store.get(layout.policy_signature(version), slice(0, MAX_ENVELOPE_BYTES + 1))
    except NotFound as error:
        raise Untrusted(f"policy {version} is not signed: publish it with the identity of the learner") from error
    said = decode_record(root.vouched(envelope, STATEMENT_TYPE, CANDIDATE), PolicyStatement)
    if (said.run, said.policy) != (run.manifest.name, published):
        raise Untrusted(
            f"policy {version}: its signature is for policy {said.policy.version} of run {said.run!r}, manifest "
            f"{said.policy.manifest_hash}; here is run {run.manifest.name!r}, manifest {published.manifest_hash}"
        )
