"""The index and the manifest as text: what is written is read back, and nothing else is read."""

import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.runtime.cache import literal_index
from piecework.runtime.cache.literal_index import Record, parse_index, render_index
from piecework.runtime.cache.manifest import (
    Damaged,
    Identity,
    Manifest,
    decode_manifest,
    encode_manifest,
    sha256,
)

KEY = "0123456789abcdef" * 2
NAMES = st.text(
    st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="'\"\\"),
    min_size=1,
    max_size=30,
)
DIGESTS = st.binary(max_size=4).map(sha256)
RECORDS = st.dictionaries(NAMES, st.builds(Record, DIGESTS, st.integers(0, 1 << 40)), max_size=5)
IDENTITIES = st.builds(
    Identity,
    st.just(KEY),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["backbone", "draft"]),
)
MANIFESTS = st.builds(
    Manifest,
    IDENTITIES,
    st.dictionaries(
        st.sampled_from(["stitched.py", "piecework_compile_cache.py"]),
        st.lists(st.none() | DIGESTS, min_size=1, max_size=2).map(tuple),
    ),
    st.dictionaries(DIGESTS, st.integers(0, 1 << 40), max_size=4),
)
HMAC_KEYS = st.none() | st.binary(min_size=16, max_size=40)


@settings(deadline=None)
@given(RECORDS)
def test_index_round_trip(records: dict[str, Record]) -> None:
    raw = render_index(KEY, records)
    assert parse_index(raw, KEY) == records
    assert render_index(KEY, dict(reversed(records.items()))) == raw
    with pytest.raises(Damaged, match="another key"):
        parse_index(raw, "f" * 32)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="{}()[],:'\"0123456789 abcn\n#-+*_.\\\té", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """There is no third outcome: no crash, no other exception."""
    try:
        records = parse_index(text.encode(), KEY)
    except Damaged:
        return
    assert parse_index(render_index(KEY, records), KEY) == records


@settings(deadline=None)
@given(RECORDS.filter(bool), st.data())
def test_any_changed_character_of_an_index_gives_typed_records_or_is_refused(
    records: dict[str, Record], data: st.DataObject
) -> None:
    raw = bytearray(render_index(KEY, records))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    try:
        parsed = parse_index(bytes(raw), KEY)
    except Damaged:
        return
    assert all(isinstance(record, Record) for record in parsed.values())


@settings(deadline=None)
@given(MANIFESTS, HMAC_KEYS)
def test_manifest_round_trip(manifest: Manifest, hmac_key: bytes | None) -> None:
    raw = encode_manifest(manifest, hmac_key)
    decoded = decode_manifest(raw, manifest.identity, hmac_key)
    assert (decoded.files, decoded.artifacts) == (manifest.files, manifest.artifacts)
    assert decoded.signed == (hmac_key is not None)
    with pytest.raises(Damaged, match="another entry"):
        decode_manifest(raw, Identity(KEY, 77, 0, "backbone"), hmac_key)
    with pytest.raises(Damaged, match="signature"):
        decode_manifest(raw, manifest.identity, b"some other key of enough bytes")
    if hmac_key is not None:
        with pytest.raises(Damaged, match="signature"):
            decode_manifest(raw, manifest.identity, None)


@settings(deadline=None)
@given(MANIFESTS, HMAC_KEYS, st.data())
def test_any_changed_byte_of_a_manifest_is_seen(
    manifest: Manifest, hmac_key: bytes | None, data: st.DataObject
) -> None:
    raw = encode_manifest(manifest, hmac_key)
    position = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != raw[position]))
    changed = raw[:position] + bytes([value]) + raw[position + 1 :]
    with pytest.raises(Damaged):
        decode_manifest(changed, manifest.identity, hmac_key)


@pytest.mark.parametrize("tail", [b"\n", b" ", b"\t"])
def test_a_manifest_has_one_form(tail: bytes) -> None:
    """JSON of the same meaning but other bytes is not what was written."""
    identity = Identity(KEY, 0, 0, "backbone")
    raw = encode_manifest(Manifest(identity, {"stitched.py": (None,)}, {}), None)
    assert not decode_manifest(raw, identity, None).signed
    forms = [
        raw + tail,
        tail + raw,
        raw.replace(b"\n ", tail + b"\n ", 1),
        raw.replace(b'"format": 1', b'"format": 1, "format": 1', 1),
    ]
    for form in forms:
        assert json.loads(form) == json.loads(raw)
        with pytest.raises(Damaged, match="the form in which it was written"):
            decode_manifest(form, identity, None)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5,
        "{" * 100_000,
        "-1",
        "1+1",
        "9" * 16,
        "0x1",
        "1.5",
        "1_0",
        "[]",
        "None",
        "f''",
        "b''",
        r"'\n'",
        "'''\n'''",
        "x",
        "()()[0]",
        "# comment",
        "\t",
        "\0",
        ";",
    ],
)
def test_pythons_parser_sees_nothing_but_the_grammar_of_an_index(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some releases of Python can be crashed by what they parse, so most texts never get there."""

    def parsed(*arguments: object, **options: object) -> None:
        raise AssertionError("handed to the parser")

    monkeypatch.setattr(literal_index, "ast", SimpleNamespace(parse=parsed))
    with pytest.raises(Damaged):
        parse_index(text.encode(), KEY)


@pytest.mark.nightly
def test_every_changed_bit_of_a_manifest_is_seen() -> None:
    chance = random.Random(1)
    artifacts = {sha256(chance.randbytes(4)): index for index in range(8)}
    identity = Identity(KEY, 0, 0, "backbone")
    raw = encode_manifest(Manifest(identity, {"stitched.py": (None,)}, artifacts), None)
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            decode_manifest(bytes(changed), identity, None)


@pytest.mark.parametrize(
    ("files", "artifacts"),
    [
        ({"../x.py": (None,)}, {}),
        ({".hidden": (None,)}, {}),
        ({"a/b": (None,)}, {}),
        ({"x.py": ()}, {}),
        ({"x.py": ("short",)}, {}),
        ({"x.py": (None,) * 5}, {}),
        ({}, {"short": 1}),
        ({}, {"0" * 64: -1}),
        ({}, {"0" * 64: True}),
        ({}, {"0" * 64: 1 << 50}),
        ({}, {"0" * 64: 1.5}),
    ],
)
def test_sealed_but_impossible_manifests(
    files: dict[str, tuple[str | None, ...]], artifacts: dict[str, int]
) -> None:
    """The seal proves who wrote it, not that it makes sense."""
    identity = Identity(KEY, 0, 0, "backbone")
    raw = encode_manifest(Manifest(identity, files, artifacts), None)
    with pytest.raises(Damaged):
        decode_manifest(raw, identity, None)
