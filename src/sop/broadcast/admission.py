"""From a version number to verified weights: who vouches for it, whether it fits this robot, every byte of it."""

from collections.abc import Callable
from dataclasses import dataclass

from sop.broadcast.fetch import PolicyReader, manifest_bytes, read_manifest
from sop.broadcast.last_good import KeptPolicy
from sop.broadcast.manifest import PolicyManifest
from sop.broadcast.vetting import PolicyVetting
from sop.broadcast.weights import check_encoding
from sop.core import layout
from sop.core.channel import PolicyRef, PolicyStatement
from sop.core.codec import content_hash
from sop.core.embodiment import Embodiment
from sop.core.errors import NotFound, PolicyRefused, Untrusted
from sop.transport.base import ObjectStore
from sop.trust.envelope import MAX_ENVELOPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Every check of a policy that can be made before it is loaded, the cheapest first. Used on one thread."""

    store: ObjectStore
    """Where policies are; read only."""
    reader: PolicyReader
    """Fetches and verifies tensors."""
    embodiment: Embodiment
    """This robot."""
    vetting: PolicyVetting | None
    """Whom this robot believes; None asks for no signatures."""
    accepts: Callable[[PolicyManifest], str | None]
    """Why this robot cannot run a policy, in words; None when it can."""

    def fetch(self, version: int, *, named: bool = False) -> tuple[KeptPolicy, PolicyStatement | None]:
        """A published policy that this robot may run, and what was signed about it. Blocks for the transfer.

        Args:
            version: which one.
            named: a person or the run asked for this very version (`PolicyVetting.admit`).

        Raises:
            NotFound: not published, or its tensors are gone.
            NotNow: it cannot be believed at the moment.
            Untrusted: nobody whom this robot believes vouches for it, or it is older than what was seen.
            InvalidRecord: the manifest is not valid.
            PolicyRefused: for another robot, or its tensors are not what the manifest says.
            StoreUnavailable: no answer; the same call may work later.
        """
        manifest = manifest_bytes(self.store, version)
        policy = PolicyRef(version, content_hash(manifest))
        signature, statement = b"", None
        if self.vetting is not None:
            try:
                signature = self.store.get(layout.policy_signature(version), slice(0, MAX_ENVELOPE_BYTES + 1))
            except NotFound as error:
                raise Untrusted(f"policy {version}: nobody signed it") from error
            statement = self.vetting.admit(policy, signature, named=named)
        described = read_manifest(manifest, version)
        self.check(described)
        read = self.reader.read(described)
        return KeptPolicy(policy=policy, manifest=manifest, signature=signature, read=read), statement

    def check(self, manifest: PolicyManifest) -> None:
        """What can be refused without the tensors.

        Raises:
            PolicyRefused: an unknown encoding, another robot, or the owner objects.
        """
        check_encoding(manifest)
        difference = self.embodiment.difference(manifest.spec.embodiment)
        if difference is not None:
            raise PolicyRefused(f"policy {manifest.version}: made for another robot: {difference}")
        objection = self.accepts(manifest)
        if objection is not None:
            raise PolicyRefused(f"policy {manifest.version}: {objection}")
