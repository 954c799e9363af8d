"""The public surface, enumerated: a name that appears or goes does so on purpose, here and in the CHANGELOG."""

import importlib
import types

import pytest

PUBLIC = {
    "actor": "Actor ActorReporter ActorSettings ActorState ChunkPlayback EpisodeRecorder EpisodeSpool Exploration "
    "GatedRobot PinnedPolicy PolicySource RobotLimits SafetyGate SafetyLatch SpoolWriter StepJournal Uploader "
    "load_limits recover_interrupted",
    "algorithms": "ALGORITHMS Algorithm AlgorithmKind Imitation LossPolicy make_algorithm",
    "broadcast": "PolicyFacts PolicyManifest PolicyReader Prepare Publisher ReadCost ReadPolicy StagedPolicy "
    "Subscriber fetch_manifest fetch_policy fetch_weights prepare_with published_versions LastGood PolicyVetting "
    "SignedState manifest_bytes newest_state open_state publish_root publish_state",
    "fleet": "STORE_ADMINS Fleet Member Register Revocation Steps StoreAdmin load_register",
    "buffer": "AdaptiveSampler BatchLoader EpisodeIndex EpisodeRow IndexSegments Ingest IngestedEpisode PayloadCache "
    "Payloads RowBlock labels_id open_payloads",
    "learner": "Bookkeeping Checkpoint CheckpointStore Learner Optimization",
    "operators": "Demonstrator Nobody OPERATORS Operator Oracle StandIn check_operator make_operator",
    "policies": "BranchVelocities ConditionedPolicy POLICIES PolicyKind TrainablePolicy check_policy "
    "compute_normalization conditioned freeze make_policy make_spec shard_blocks",
    "report": "describe summarise write_report",
    "robots": "DEPLOYMENT LAB ROBOTS RobotObservation Scene SimulatedRobot make_robot",
    "transport": "BUSES Cursor Data DirectoryStore EventBus Identity MapsObjects ObjectStore STORES SqliteBus "
    "default_bus_url load_identity open_bus open_store own_identity probe",
    "trust": "CANDIDATE MAX_ENVELOPE_BYTES RELEASE ROOT PublicKey Role SigningKey TrustMemory TrustRoot "
    "claimed_payload cosign open_envelope",
}


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_a_package_offers_exactly_these_names(package: str) -> None:
    module = importlib.import_module(f"sop.{package}")
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_what_a_package_defines_itself_is_in_its_list(package: str) -> None:
    """A public function or class in `__init__` that is not offered is a mistake."""
    module = importlib.import_module(f"sop.{package}")
    own = {
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType | type) and value.__module__ == module.__name__
    }
    assert {name for name in own if not name.startswith("_")} <= set(module.__all__)
