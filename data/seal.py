"""Manifests in JSON that say whether they are whole: a changed digit would still be JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from typing import Any

CHECKSUM = "checksum"


def seal(body: Mapping[str, Any]) -> str:
    """Return ``body`` as one line of JSON with sorted keys, its checksum among them."""
    return json.dumps({**body, CHECKSUM: _checksum(body)}, sort_keys=True) + "\n"


def unseal(raw: bytes, keys: Set[str]) -> dict[str, Any]:
    """Return what :func:`seal` was given; contents without a checksum are taken as they are.

    Args:
        raw: a JSON object.
        keys: those that it may have; another one is a damaged name.

    Raises:
        ValueError: no JSON, another key, or contents that are not those of the checksum.
        AttributeError: no object.
    """
    body = json.loads(raw)
    wanted = body.pop(CHECKSUM, None)
    unknown = sorted(body.keys() - keys)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}")
    if wanted is not None and wanted != _checksum(body):
        raise ValueError(f"its contents are not those of its {CHECKSUM}")
    return dict(body)


def _checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON text with sorted keys, as ``json.dumps`` writes it."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
