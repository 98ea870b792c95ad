"""Sealed messages: what Python and cwt seal, the devices' C opens; and nothing else."""

from __future__ import annotations

import hashlib
import hmac
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cwt import COSE, COSEAlgs, COSEHeaders, COSEKey
from hypothesis import given
from hypothesis import strategies as st

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.wire import cose

KEY = bytes(range(32))
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(100, 132)))
PUBLIC = cose.public_key(SIGNER)
TOPIC = "tinyfleet/home/devices/one/command"
ORDER = 2**252 + 27742317777372353535851937790883648493


def parse(message: bytes) -> tuple[int, object]:
    """The C parser's error, and its result, which points into the message."""
    kept = ffi.from_buffer(message) if message else ffi.NULL
    found = ffi.new("mote_cose_t *")
    found_error = int(lib.mote_cose_parse(kept, len(message), found))
    return found_error, (found, kept)


def opened(message: bytes, key: bytes, topic: str = TOPIC) -> bytes | None:
    """The payload, if the C code takes the seal."""
    error, (found, _) = parse(message)  # type: ignore[misc]
    if error:
        return None
    name = topic.encode()
    if found.kind == lib.MOTE_COSE_MAC0:
        error = lib.mote_cose_check_mac0(found, key, name, len(name))
    else:
        verify = ffi.new("mote_verify_t *", (ffi.NULL, lib.mote_ed25519_verify))
        error = lib.mote_cose_check_sign1(found, verify, key, name, len(name))
    return None if error else bytes(ffi.buffer(found.payload, found.payload_size))


def test_sha256_is_hashlibs_at_every_length() -> None:
    data = random.Random(1).randbytes(400)
    digest = ffi.new("uint8_t[32]")
    for size in range(401):
        hash = ffi.new("mote_sha256_t *")
        lib.mote_sha256_init(hash)
        lib.mote_sha256_add(hash, data[: size // 3], size // 3)
        lib.mote_sha256_add(hash, data[size // 3 : size], size - size // 3)
        lib.mote_sha256_end(hash, digest)
        assert bytes(digest) == hashlib.sha256(data[:size]).digest(), size


def verify(key: bytes, signature: bytes, head: bytes, body: bytes = b"") -> bool:
    return lib.mote_ed25519_verify(ffi.NULL, key, signature, head, len(head), body, len(body)) == lib.MOTE_OK


def test_signatures_of_messages_of_every_length_are_verified() -> None:
    """And with them SHA-512, at every length of its padding."""
    data = random.Random(2).randbytes(400)
    for size in range(0, 400):
        message = data[:size]
        signature = SIGNER.sign(message)
        assert verify(PUBLIC, signature, message[: size // 2], message[size // 2 :]), size


@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [  # RFC 8032, 7.1
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_the_vectors_of_rfc_8032(secret: str, public: str, message: str, signature: str) -> None:
    assert cose.public_key(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))).hex() == public
    assert verify(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message))


def test_a_signature_has_one_form() -> None:
    signature = SIGNER.sign(b"message")
    s = int.from_bytes(signature[32:], "little")
    for other in (s + ORDER, s + 8 * ORDER, 2**256 - 1):
        forged = signature[:32] + (other % 2**256).to_bytes(32, "little")
        assert not verify(PUBLIC, forged, b"message")
    assert not verify(PUBLIC, bytes(64), b"message")
    assert not verify(b"\xff" * 32, signature, b"message"), "no point of the curve"


def test_every_damaged_bit_of_a_signature_or_a_message_is_found() -> None:
    signature = SIGNER.sign(b"a message")
    for bit in range(512):
        damaged = bytearray(signature)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not verify(PUBLIC, bytes(damaged), b"a message"), bit
    assert not verify(PUBLIC, signature, b"A message")


SIZES = [0, 1, 23, 24, 100, 255, 256, 2000, 65535, 65536]


@pytest.mark.parametrize("size", SIZES)
def test_sealed_messages_are_cwts(size: int) -> None:
    payload = random.Random(size).randbytes(size)
    key = COSEKey.from_symmetric_key(KEY, alg="HS256")
    mac = COSE.new().encode(payload, key, protected={COSEHeaders.ALG: COSEAlgs.HS256}, external_aad=TOPIC.encode())
    assert cose.mac0(payload, KEY, TOPIC) == mac and opened(mac, KEY) == payload
    signed = cose.sign1(payload, SIGNER, TOPIC)
    assert signed[:17] == bytes.fromhex("d2844da201270448") + cose.key_id(PUBLIC) + b"\xa0"
    assert opened(signed, PUBLIC) == payload


def test_a_seal_is_the_rfcs() -> None:
    """COSE's structures, written out from RFC 9052, 4.4 and 6.3."""
    payload, aad = b"payload", b"\x58" + bytes([len(TOPIC)]) + TOPIC.encode()
    mac = hmac.digest(KEY, b"\x84\x64MAC0\x43\xa1\x01\x05" + aad + b"\x47" + payload, "sha256")
    assert cose.mac0(payload, KEY, TOPIC) == b"\xd1\x84\x43\xa1\x01\x05\xa0\x47" + payload + b"\x58\x20" + mac
    header = b"\x4d\xa2\x01\x27\x04\x48" + cose.key_id(PUBLIC)
    signature = SIGNER.sign(b"\x84\x6aSignature1" + header + aad + b"\x47" + payload)
    sealed = b"\xd2\x84" + header + b"\xa0\x47" + payload + b"\x58\x40" + signature
    assert cose.sign1(payload, SIGNER, TOPIC) == sealed and opened(sealed, PUBLIC) == payload


@pytest.mark.parametrize("sealed", [cose.mac0(b"payload", KEY, TOPIC), cose.sign1(b"payload", SIGNER, TOPIC)])
def test_nothing_but_the_sealed_message_is_opened(sealed: bytes) -> None:
    key = KEY if sealed[0] == 0xD1 else PUBLIC
    assert opened(sealed, key) == b"payload"
    assert opened(sealed, bytes(32)) is None and opened(sealed, key, TOPIC + "s") is None
    assert opened(sealed, key, "t" * 129) is None
    for size in range(len(sealed)):
        assert opened(sealed[:size], key) is None, size
    assert opened(sealed + b"\0", key) is None
    id = range(8 * 8, 16 * 8)  # the key's id says which key to take; this test has taken it
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert opened(bytes(damaged), key) is None, (bit, bit in id)


def test_lengths_in_a_longer_form_are_refused() -> None:
    sealed = cose.mac0(b"payload", KEY, TOPIC)
    for longer in (b"\x58\x07", b"\x59\x00\x07", b"\x5a\x00\x00\x00\x07", b"\x5b" + bytes(7) + b"\x07", b"\x5f"):
        assert parse(sealed[:7] + longer + sealed[8:])[0] == lib.MOTE_ERR_FORMAT
    assert parse(sealed[:7] + b"\x5a\xff\xff\xff\xff" + sealed[8:])[0] == lib.MOTE_ERR_FORMAT


@given(st.binary(max_size=200), st.sampled_from([b"", cose.mac0(b"p", KEY, TOPIC), cose.sign1(b"p", SIGNER, TOPIC)]))
def test_anything_is_refused(noise: bytes, start: bytes) -> None:
    assert opened(start[: len(noise)] + noise, KEY) is None
