"""Every decoder of bytes from outside: whatever the bytes are, a record or an error in words, in bounded memory.

`DECODERS` is the list. A function in `src/sop` that looks like a decoder and is neither there nor in `NOT_HERE` fails
the first test.
"""

import contextlib
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broadcast_examples import policy
from hostile_examples import RUN
from sop.actor.gate_wire import Command, CommandKind, decode_command, encode_command
from sop.broadcast.fetch import read_manifest
from sop.broadcast.manifest import PolicyManifest
from sop.buffer.rows import EpisodeRow, RowBlock
from sop.buffer.screening import Flag, Rule, decode_note, encode_note
from sop.buffer.segments import decode_segment, encode_segment
from sop.core.channel import PROD, ChannelState, PolicyRef, PolicyStatement, decode_record, encode_record
from sop.core.codec import EncodedEpisode, decode, encode
from sop.core.episode import Outcome
from sop.core.errors import SopError
from sop.core.evaluation import EvaluationResult, TaskResult
from sop.core.events import (
    ActorReported,
    EpisodeCommitted,
    LearnerReported,
    PolicyPublished,
    PolicySwapped,
    decode_event,
    encode_event,
)
from sop.core.experience import Sidecar, Source
from sop.core.layout import EpisodeKey, SegmentKey
from sop.core.lineage import Lineage, StepDraw
from sop.core.run import RunManifest
from sop.core.sidecar import decode_sidecar, encode_sidecar
from sop.learner.checkpoint import CheckpointStore
from sop.learner.lease import LearnerLease
from sop.testing.episodes import make_episode
from sop.testing.memory import MemoryStore
from sop.trust.envelope import open_envelope
from sop.trust.keys import PublicKey, SigningKey

SOURCE = Path(__file__).parent.parent / "src" / "sop"
KEY = EpisodeKey("episodes", "robot-0", 0, 4, "0" * 32)
EVENTS = (EpisodeCommitted, PolicyPublished, PolicySwapped, ActorReported, LearnerReported)


def read_checkpoint(data: bytes) -> object:
    """`state.json` of a checkpoint as a restarted learner reads it."""
    store = MemoryStore()
    store.put("checkpoints/00000001/state.json", data)
    store.put("checkpoints/00000001/tensors.safetensors", b"")
    return CheckpointStore(store, _NoSegments()).newest()  # type: ignore[arg-type]


class _NoSegments:
    def load(self, keys: Any) -> None:
        assert isinstance(keys, list | tuple)


def read_token(data: bytes) -> object:
    """The token of a learner's lease as a newcomer reads it."""
    store = MemoryStore()
    store.put("leases/learner/00000001.json", data)
    return LearnerLease(store, owner="b", patience_s=1e-9, clock=iter(range(9)).__next__).acquire()


def read_any_event(data: bytes) -> object:
    for kind in EVENTS:
        try:
            return decode_event(data, kind)
        except SopError as error:
            last = error
    raise last


def _lineage() -> bytes:
    draws = StepDraw(learner_step=1, keys=(str(KEY),), starts=np.zeros(1, np.int32), batch_hash="0" * 32)
    return Lineage(draws=(draws,), learned=()).encode()


def _segment() -> bytes:
    row = EpisodeRow(
        episode_id="0" * 32, actor_id="robot-0", sequence=0, task="push", source=Source.ONLINE, num_steps=9,
        human_steps=0, num_interventions=0, policy_version=1, outcome=Outcome.SUCCESS, start_runs=((0, 3), (5, 2)),
        end_utc_ns=0, indexed_utc_ns=0,
    )  # fmt: skip
    return encode_segment(RowBlock.from_rows([row]))


EVALUATION = EvaluationResult(
    version=1, name="base", first_seed=0, tasks={"push": TaskResult(episodes=2, successes=1, robot_s=9.0)},
    online_episodes=3, utc_ns=1, published_utc_ns=1,
).to_json()  # fmt: skip
MANIFEST = policy(1)[0].to_json()
SEGMENT_KEY = str(SegmentKey("0" * 32, 0, 1, "0" * 32))
REF = PolicyRef(3, "a" * 32)
STATE = ChannelState(run="r", channel=PROD, sequence=1, stable=REF, issued_utc_ns=1, expires_utc_ns=2)
STATEMENT = PolicyStatement(run="r", policy=REF, issued_utc_ns=1, expires_utc_ns=2)
EVENT = EpisodeCommitted(key=str(KEY), outcome="success", ended_utc_ns=0, committed_utc_ns=0)
COMMAND = Command(sequence=1, monotonic_ns=2, action=np.ones(2, np.float32), kind=next(iter(CommandKind)))
ENVELOPE = b'{"payload":"e30=","payloadType":"x","signatures":[{"keyid":"a","sig":"YQ=="}]}'

DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "core/codec.py:decode": (decode, encode(make_episode("pphh"))),
    "core/arrow.py:read_single_batch": (lambda data: EncodedEpisode(data, trusted=False), encode(make_episode("pp"))),
    "core/events.py:decode_event": (read_any_event, encode_event(EVENT)),
    "core/channel.py:decode_record": (lambda data: decode_record(data, ChannelState), encode_record(STATE)),
    "core/channel.py:decode_record (statement)": (
        lambda data: decode_record(data, PolicyStatement),
        encode_record(STATEMENT),
    ),
    "core/sidecar.py:decode_sidecar": (
        decode_sidecar,
        encode_sidecar(Sidecar(version=1, columns={"value": np.zeros(4, np.float32)}), KEY),
    ),
    "core/lineage.py:decode": (Lineage.decode, _lineage()),
    "core/run.py:from_json": (RunManifest.from_json, RUN.to_json()),
    "core/evaluation.py:from_json": (EvaluationResult.from_json, EVALUATION),
    "core/layout.py:parse": (lambda data: EpisodeKey.parse(data.decode("latin-1")), str(KEY).encode()),
    "core/layout.py:parse (segment)": (
        lambda data: SegmentKey.parse(data.decode("latin-1")),
        SEGMENT_KEY.encode(),
    ),
    "broadcast/manifest.py:from_json": (PolicyManifest.from_json, MANIFEST),
    "broadcast/fetch.py:read_manifest": (lambda data: read_manifest(data, 1), MANIFEST),
    "buffer/segments.py:decode_segment": (decode_segment, _segment()),
    "buffer/screening.py:decode_note": (decode_note, encode_note(str(KEY), (Flag(Rule.BLACK_IMAGES, "x"),))),
    "learner/checkpoint.py:state.json": (read_checkpoint, b'{"learner_step":1,"tensors_hash":"","state":{}}'),
    "learner/lease.py:token": (
        read_token,
        b'{"owner":"a","host":"h","pid":1,"since_utc_ns":1,"nonce":""}',
    ),
    "trust/envelope.py:open_envelope": (lambda data: open_envelope(data, "x", []), ENVELOPE),
    "trust/keys.py:from_json": (PublicKey.from_json, SigningKey.generate().public.to_json()),
    "actor/gate_wire.py:decode_command": (lambda data: decode_command(data, 2), encode_command(COMMAND)),
}
NOT_HERE = {
    "broadcast/container.py:read_header": "weights: test_broadcast_packed.py, test_broadcast_refusals.py",
    "broadcast/planes.py:decode_planes": "kernel behind decode_packed: test_broadcast_packed.py",
    "broadcast/rans.py:decode_symbols": "kernel behind decode_packed: test_broadcast_packed.py",
    "broadcast/delta.py:decode_packed": "weights: test_broadcast_packed.py",
    "broadcast/delta.py:decode": "part of decode_packed",
    "broadcast/ulp.py:decode_delta": "kernel behind decode_packed: test_broadcast_packed.py",
    "broadcast/ulp.py:decode_exponents": "kernel behind decode_packed: test_broadcast_packed.py",
    "broadcast/weights.py:open_full": "weights: test_hostile_files.py",
    "buffer/jobs.py:read_message": "a pipe between processes of one machine and user",
    "chaos/recovery.py:read_work": "times of episodes that were decoded before, and of `read_metrics`",
    "learner/messages.py:decode": "between the ranks of one learner",
    "learner/messages.py:decode_learned": "between the ranks of one learner",
    "transport/nats_stream.py:decode": "answers of the bus: test_transport_nats_bus.py",
    "transport/nats_connection.py:parse": "a URL, and the protocol of the NATS client",
    "transport/cloud_engine.py:parse_place": "a URL that a person typed: test_transport_cloud_store.py",
    "operators/link.py:decode_status": "the operator's link: test_operators_link.py",
    "fleet/identities.py:read_store_keys": "a file of this machine: test_fleet",
    "fleet/files.py:read_file": "a file of this machine: test_fleet",
    "lineage.py:read_lineage": "reads a key, then core/lineage.py:decode",
    "buffer/segments.py:read_segment": "reads a key, then decode_segment",
    "metrics.py:read_metrics": "a file of this machine",
    "chaos/drill.py:read_results": "a file of this machine",
    "chaos/soak_curve.py:read_episodes": "a file of this machine",
    "chaos/soak_curve.py:read_published": "a file of this machine",
}
_LOOKS_LIKE_ONE = re.compile(
    r"def (from_json|decode|decode_\w+|parse|parse_\w+|open_full|open_envelope|read_(?!symbols|raw|prefix)\w+)\("
)


def test_the_list_of_decoders_is_complete() -> None:
    found = {
        f"{path.relative_to(SOURCE)}:{match[1]}"
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] not in {"testing", "report", "experiments", "policies"}
        for match in _LOOKS_LIKE_ONE.finditer(path.read_text())
    }
    listed = {name.partition(" ")[0] for name in DECODERS} | set(NOT_HERE)
    assert found - listed == set(), "put new decoders into DECODERS, or say in NOT_HERE where they are tested"


@pytest.mark.parametrize("name", [name for name in DECODERS if "checkpoint" not in name and "envelope" not in name])
def test_the_examples_are_records(name: str) -> None:
    """Otherwise the damaged ones would be refused for another reason."""
    read, example = DECODERS[name]
    read(example)


def attempt(name: str, data: bytes) -> None:
    """Decode; anything but a record or a SopError fails the test."""
    with contextlib.suppress(SopError):
        DECODERS[name][0](data)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.data())
def test_damaged_records_are_refused_in_words(name: str, cuts: st.DataObject) -> None:
    """Faults 6 and 17: bytes changed, cut out, doubled, put in, or all new."""
    data = bytearray(DECODERS[name][1])
    for _ in range(cuts.draw(st.integers(1, 4))):
        place, size = cuts.draw(st.integers(0, max(0, len(data)))), cuts.draw(st.integers(0, 16))
        piece = cuts.draw(st.sampled_from([b"", bytes(data[place : place + size]) * 2]) | st.binary(max_size=12))
        data[place : place + size] = piece
    attempt(name, bytes(data))
    attempt(name, cuts.draw(st.binary(max_size=64)))


_LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
JSON = [name for name, (_, example) in DECODERS.items() if example.startswith(b"{")]


@pytest.mark.parametrize("name", JSON)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(choice=st.data())
def test_json_with_other_values_is_refused_in_words(name: str, choice: st.DataObject) -> None:
    """Fault 17: bad schema: right fields, wrong values."""
    record = msgspec.json.decode(DECODERS[name][1])
    for field in choice.draw(st.lists(st.sampled_from(sorted(record)), max_size=3)):
        record[field] = choice.draw(_VALUES)
    try:
        data = msgspec.json.encode(record)
    except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError):
        return
    attempt(name, data)


@pytest.mark.parametrize("name", DECODERS)
def test_extreme_records_are_refused_in_words(name: str) -> None:
    """Fault 17: deep nesting, invalid text, endless numbers, nothing at all."""
    for data in (b"", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"version":1e999}', b'"' + b"9" * 100_000):
        attempt(name, data)


_BOUNDED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import test_hostile_decoders as tests
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
for name, (_, example) in tests.DECODERS.items():
    for place in range(0, len(example), max(1, len(example) // 60)):
        for byte in (0x7F, 0xFF):
            tests.attempt(name, example[:place] + bytes([byte]) * 4 + example[place + 4 :])
print("alive")
"""


@pytest.mark.slow
def test_no_decoder_takes_more_memory_than_it_may() -> None:
    """Fault 17: lengths and counts that claim gigabytes, under a limit of 256 MB for the process."""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    folder = str(Path(__file__).parent)
    found = subprocess.run([sys.executable, "-c", _BOUNDED, folder], capture_output=True, text=True, check=False)
    assert found.stdout == "alive\n", found.stderr[-2000:]
