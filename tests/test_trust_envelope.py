"""Signed envelopes and keys: what hostile bytes can be, and that none of them is believed."""

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sop.core.errors import InvalidRecord, PolicyRefused, RunError, SopError, Untrusted
from sop.trust import MAX_ENVELOPE_BYTES, PublicKey, SigningKey, claimed_payload, cosign, open_envelope
from sop.trust.envelope import MAX_SIGNATURES
from trust_examples import key

TYPE = "application/vnd.sop.test+json"
ALICE, BOB, EVE = key("alice"), key("bob"), key("eve")
PAYLOAD = b'{"version":3}'


def values(envelope: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(envelope)
    return found


def both() -> bytes:
    return cosign(ALICE.sign(TYPE, PAYLOAD), BOB)


def test_an_envelope_gives_back_what_was_signed() -> None:
    assert open_envelope(ALICE.sign(TYPE, PAYLOAD), TYPE, [ALICE.public]) == PAYLOAD
    assert claimed_payload(EVE.sign(TYPE, PAYLOAD)) == PAYLOAD


def test_keys_on_different_machines_reach_a_threshold_together() -> None:
    keys = [ALICE.public, BOB.public]
    assert open_envelope(both(), TYPE, keys, threshold=2) == PAYLOAD
    assert open_envelope(cosign(both(), EVE), TYPE, keys, threshold=2) == PAYLOAD, "strangers do no harm"
    with pytest.raises(ValueError, match="threshold must be at least 1"):
        open_envelope(both(), TYPE, keys, threshold=0)


def test_an_unknown_key_is_not_believed_and_the_message_says_whose_it_is() -> None:
    with pytest.raises(Untrusted, match=f"signed by {EVE.key_id[:16]}, believed are {ALICE.key_id[:16]}"):
        open_envelope(EVE.sign(TYPE, PAYLOAD), TYPE, [ALICE.public])


def test_a_signature_of_one_kind_of_record_is_none_of_another() -> None:
    with pytest.raises(Untrusted, match="holds 'application/other' instead of"):
        open_envelope(ALICE.sign("application/other", PAYLOAD), TYPE, [ALICE.public])
    retyped = values(ALICE.sign("application/other", PAYLOAD)) | {"payloadType": TYPE}
    with pytest.raises(Untrusted, match="0 valid signatures of the 1"):
        open_envelope(json.dumps(retyped).encode(), TYPE, [ALICE.public])


def test_below_the_threshold_is_refused() -> None:
    with pytest.raises(Untrusted, match="1 valid signatures of the 2 that are needed"):
        open_envelope(cosign(ALICE.sign(TYPE, PAYLOAD), EVE), TYPE, [ALICE.public, BOB.public], threshold=2)


def test_the_same_key_counts_once_however_often_it_signs_or_is_given() -> None:
    again = cosign(ALICE.sign(TYPE, PAYLOAD), ALICE)
    with pytest.raises(Untrusted, match="1 valid signatures of the 2"):
        open_envelope(again, TYPE, [ALICE.public, ALICE.public], threshold=2)
    doubled = values(ALICE.sign(TYPE, PAYLOAD))
    doubled["signatures"] *= 2
    with pytest.raises(Untrusted, match="Multiple signatures found"):
        open_envelope(json.dumps(doubled).encode(), TYPE, [ALICE.public])


def test_a_key_has_one_name_only() -> None:
    with pytest.raises(InvalidRecord, match=f"key_id: the id of this key is {ALICE.key_id}"):
        PublicKey(BOB.key_id, ALICE.public.public)
    renamed = values(both())
    renamed["signatures"][1] = renamed["signatures"][0] | {"keyid": BOB.key_id}
    with pytest.raises(Untrusted, match="1 valid signatures of the 2"):
        open_envelope(json.dumps(renamed).encode(), TYPE, [ALICE.public, BOB.public], threshold=2)


def test_a_tampered_payload_or_signature_is_refused() -> None:
    tampered = values(ALICE.sign(TYPE, PAYLOAD)) | {"payload": base64.b64encode(b'{"version":4}').decode()}
    with pytest.raises(Untrusted, match="0 valid signatures"):
        open_envelope(json.dumps(tampered).encode(), TYPE, [ALICE.public])
    cut = values(ALICE.sign(TYPE, PAYLOAD))
    cut["signatures"][0]["sig"] = base64.b64encode(b"short").decode()
    with pytest.raises(Untrusted, match="0 valid signatures"):
        open_envelope(json.dumps(cut).encode(), TYPE, [ALICE.public])


ENVELOPE = ALICE.sign(TYPE, PAYLOAD)
BAD = {
    "empty": b"",
    "not JSON": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 500_000,
    "number of many digits": b"1" * 10_000,
    "no signatures": json.dumps({"payload": "", "payloadType": TYPE}).encode(),
    "wrong type": json.dumps(values(ENVELOPE) | {"payload": 3}).encode(),
    "not base64": json.dumps(values(ENVELOPE) | {"payload": "%%%"}).encode(),
    "a name twice": ENVELOPE.replace(b'{"payload"', b'{"payload":"AAAA","payload"', 1),
    "a name twice, inside": ENVELOPE.replace(b'{"keyid"', b'{"keyid":"x","keyid"', 1),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_envelope_is_refused_in_words(data: bytes) -> None:
    with pytest.raises(Untrusted, match=r"not a signed envelope: .+"):
        open_envelope(data, TYPE, [ALICE.public])


def test_size_and_number_of_signatures_are_bounded() -> None:
    with pytest.raises(Untrusted, match=f"at most {MAX_ENVELOPE_BYTES} are read"):
        open_envelope(b" " * (MAX_ENVELOPE_BYTES + 1), TYPE, [ALICE.public])
    many = values(ENVELOPE)
    many["signatures"] += [{"keyid": str(n), "sig": "AAAA"} for n in range(MAX_SIGNATURES)]
    with pytest.raises(Untrusted, match=f"at most {MAX_SIGNATURES} are checked"):
        open_envelope(json.dumps(many).encode(), TYPE, [ALICE.public])


def test_untrusted_is_a_refusal_so_that_the_old_policy_stays() -> None:
    assert issubclass(Untrusted, PolicyRefused)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400))
def test_random_bytes_are_never_believed(data: bytes) -> None:
    with pytest.raises(Untrusted):
        open_envelope(data, TYPE, [ALICE.public])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_envelope_with_any_byte_changed_says_the_same_or_nothing(data: st.DataObject) -> None:
    altered = bytearray(both())
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = open_envelope(bytes(altered), TYPE, [ALICE.public, BOB.public], threshold=2)
    except Untrusted:
        return
    assert found == PAYLOAD


def test_a_key_is_written_once_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    path, made = tmp_path / "signing.pem", SigningKey.generate()
    made.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public == made.public
    with pytest.raises(RunError, match="a key is never replaced"):
        SigningKey.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(RunError, match=f"chmod 600 {path}"):
        SigningKey.load(path)


@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_no_key_is_named_and_not_quoted(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(RunError, match=str(path)) as caught:
        SigningKey.load(path)
    assert "secret" not in str(caught.value)
    assert key("alice").public.public not in repr(key("alice"))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_a_public_key_comes_back_and_random_bytes_are_none(data: bytes) -> None:
    assert PublicKey.from_json(ALICE.public.to_json()) == ALICE.public
    with pytest.raises(SopError):
        PublicKey.from_json(data)
    with pytest.raises(InvalidRecord, match="at most 16384 are read"):
        PublicKey.from_json(b" " * 20_000)
