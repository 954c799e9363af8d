"""The step journal: the running episode on the robot's disk, so that a power failure leaves what was seen until then.

    <spool>/running-00000017        begin, step, step, ..., end        records: length u32 | crc32 u32 | MessagePack

    control loop --queue--> thread: JPEG, append; fsync once a second       commit of the episode removes the file
    next start:  recover_interrupted(spool, ...) plays what is whole into an ordinary recorder and commits the episode

A file that has its end is the whole episode with its outcome (the power failed between the end and the commit); one
without becomes an episode that ended as ABORTED: stored, counted, never sampled. The control loop never waits: when
the disk is full or slow the journal of this episode ends, says why, and the recording in memory goes on.
"""

import logging
import os
import queue
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import simplejpeg

from sop.actor.recorder import EpisodeFacts, EpisodeRecorder, RecordedStep
from sop.actor.spool import EpisodeSpool
from sop.core.codec import JPEG_QUALITY
from sop.core.embodiment import Embodiment, Observation
from sop.core.episode import Episode, Outcome, SafetyCounts
from sop.core.errors import InvalidRecord
from sop.core.layout import EpisodeKey

_log = logging.getLogger(__name__)
_FRAME = struct.Struct("<II")
_MAX_RECORD_BYTES = 64 << 20
_MAX_WAITING = 256
"""Steps that may wait for the disk, some 10 s; then the journal of this episode ends."""
SYNC_EVERY_S = 1.0
"""A power failure costs at most the steps of this time, and those in the queue."""


class _Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    sequence: int
    facts: EpisodeFacts


class _Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    state: bytes
    executed: bytes
    proposal: bytes | None
    operator: tuple[str, str] | None
    monotonic_ns: int
    images: dict[str, bytes]


class _End(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    outcome: Outcome
    truncated: bool
    safety: SafetyCounts | None
    end_utc_ns: int


_Record = _Begin | _Step | _End


class StepJournal:
    """Writes the steps of the running episode in a thread. The methods never block; used by the control loop.

    Args:
        spool: whose folder holds the files; a committed episode removes its own.
    """

    def __init__(self, spool: EpisodeSpool) -> None:
        self._spool = spool
        self._queue: queue.Queue[RecordedStep | _Begin | _End | None] = queue.Queue(_MAX_WAITING)
        self._file: int | None = None
        self._synced_s = 0.0
        self._complete = False
        self.problem = ""
        """Why the running episode is not in the journal; empty when it is."""
        self._thread = threading.Thread(target=self._loop, name="step-journal", daemon=True)
        self._thread.start()

    def begin(self, sequence: int, facts: EpisodeFacts) -> None:
        """An episode begins."""
        self._complete = True
        self._put(_Begin(sequence=sequence, facts=facts))

    def append(self, step: RecordedStep) -> None:
        """One more step was executed; its arrays are not changed any more."""
        self._put(step)

    def end(self, episode: Episode) -> None:
        """The episode is complete; a crash before its commit loses nothing of it any more."""
        self._put(
            _End(
                outcome=episode.outcome,
                truncated=episode.truncated,
                safety=episode.safety,
                end_utc_ns=episode.end_utc_ns,
            )
        )

    def close(self) -> None:
        """Write what waits, then stop. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _put(self, item: RecordedStep | _Begin | _End) -> None:
        if not self._complete:  # a file with a gap would be recovered as an episode that never was
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._complete = False
            self.problem = "the disk is too slow for the step journal"

    def _loop(self) -> None:
        waits = False
        while True:
            try:
                item = self._queue.get(timeout=SYNC_EVERY_S if waits else None)
            except queue.Empty:
                waits = self._attempt(None)
                continue
            if item is None:
                return self._finish()
            waits = self._attempt(item) and not isinstance(item, _End)

    def _attempt(self, item: RecordedStep | _Begin | _End | None) -> bool:
        """Write, or sync when there is nothing to write; whether something waits for a sync."""
        try:
            if isinstance(item, _Begin):
                self._finish()
                path = self._spool.running(item.sequence)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                self._synced_s, self.problem = 0.0, ""
            if self._file is None:
                return False
            if item is not None:
                _write(self._file, _as_record(item) if isinstance(item, RecordedStep) else item)
            return not self._sync_when_due(now=item is None or isinstance(item, _End))
        except OSError as error:
            self.problem = f"the step journal cannot be written: {error}"
            _log.error(self.problem)
            self._finish()
            return False

    def _sync_when_due(self, *, now: bool) -> bool:
        if not now and time.monotonic() - self._synced_s < SYNC_EVERY_S:
            return False
        if self._file is not None:
            os.fsync(self._file)
        self._synced_s = time.monotonic()
        return True

    def _finish(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def recover_interrupted(spool: EpisodeSpool, embodiment: Embodiment) -> list[EpisodeKey]:
    """Commit the episodes that were running or not yet committed when the robot's program died. Blocks.

    Call it before the next sequence number is asked for. Idempotent. A file without a step is removed; one that
    cannot be read from its beginning, or is another robot's, is kept as `<name>.refused`.

    Raises:
        SpoolFull: no room; the files stay.
    """
    keys = []
    for path in spool.interrupted():
        try:
            episode = _replay(path, embodiment, spool.actor_id)
            if episode is None:
                path.unlink()
                continue
            keys.append(spool.commit(episode))
            _log.warning("episode %d was interrupted: %d steps recovered", episode.sequence, episode.num_steps)
        except InvalidRecord as error:
            _log.error("%s cannot be recovered: %s", path, error)
            path.replace(path.with_name(path.name + ".refused"))
    return keys


def _replay(path: Path, embodiment: Embodiment, actor_id: str) -> Episode | None:
    """What is whole of an interrupted episode; None when that is no step."""
    if not path.stat().st_size:
        return None
    records = _read(path)
    begin = next(records, None)
    if not isinstance(begin, _Begin):
        raise InvalidRecord("begin", "the journal does not begin with one")
    if begin.facts.robot != embodiment.name:
        raise InvalidRecord("robot", f"recorded by {begin.facts.robot!r}, this robot is {embodiment.name!r}")
    clock = _RecordedClock(begin.facts.start_utc_ns)
    recorder = EpisodeRecorder(actor_id, embodiment, clock)
    recorder.begin(begin.facts.task, begin.facts.instruction, begin.facts.policy_version, begin.facts.policy_times)
    for record in records:
        if isinstance(record, _Step):
            clock.step(record.monotonic_ns)
            _play(record, recorder, embodiment)
        elif isinstance(record, _End):
            clock.utc = record.end_utc_ns
            if not recorder.num_steps:
                return None
            return recorder.finish(begin.sequence, record.outcome, truncated=record.truncated, safety=record.safety)
    return recorder.finish(begin.sequence, Outcome.ABORTED, truncated=False) if recorder.num_steps else None


def _play(step: _Step, recorder: EpisodeRecorder, embodiment: Embodiment) -> None:
    if set(step.images) != set(embodiment.cameras):
        raise InvalidRecord("images", f"cameras {sorted(step.images)}, this robot has {sorted(embodiment.cameras)}")
    try:
        images = {camera: simplejpeg.decode_jpeg(data, colorspace="RGB") for camera, data in step.images.items()}
        proposal = None if step.proposal is None else np.frombuffer(step.proposal, np.float32)
        seen = Observation(images, np.frombuffer(step.state, np.float32))
        recorder.append(seen, np.frombuffer(step.executed, np.float32), proposal, step.operator)
    except ValueError as error:
        raise InvalidRecord("step", f"cannot be decoded: {error}") from error


class _RecordedClock:
    """The clock of the interrupted episode, as far as the journal tells."""

    def __init__(self, start_utc_ns: int) -> None:
        self.utc, self._now_ns = start_utc_ns, -1

    def step(self, monotonic_ns: int) -> None:
        if self._now_ns >= 0:
            self.utc += max(monotonic_ns - self._now_ns, 0)
        self._now_ns = monotonic_ns

    def monotonic_ns(self) -> int:
        return self._now_ns

    def utc_ns(self) -> int:
        return self.utc

    def sleep_until(self, monotonic_ns: int) -> None:
        raise NotImplementedError("a recorded clock does not sleep")


def _as_record(step: RecordedStep) -> _Step:
    return _Step(
        state=step.state.tobytes(),
        executed=step.executed.tobytes(),
        proposal=None if step.proposal is None else step.proposal.tobytes(),
        operator=step.operator,
        monotonic_ns=step.monotonic_ns,
        images={
            camera: simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY)
            for camera, image in step.images.items()
        },
    )


def _write(file: int, record: _Record) -> None:
    data = msgspec.msgpack.encode(record)
    whole = _FRAME.pack(len(data), zlib.crc32(data)) + data
    if os.write(file, whole) != len(whole):
        raise OSError("the disk took half of a record")


def _read(path: Path) -> Iterator[_Record]:
    """The records of a file until the first that is not whole."""
    with path.open("rb") as file:
        while len(head := file.read(_FRAME.size)) == _FRAME.size:
            length, check = _FRAME.unpack(head)
            if length > _MAX_RECORD_BYTES:
                return
            data = file.read(length)
            if len(data) != length or zlib.crc32(data) != check:
                return
            try:
                yield msgspec.msgpack.decode(data, type=_Record)
            except msgspec.DecodeError:
                return
