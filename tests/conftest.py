"""Fixtures every room shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.s3server import NoServerError, s3_server

settings.register_profile("laws", deadline=None)  # a law is true on a busy machine too
settings.load_profile("laws")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Prefix of a bucket on a real S3 server; the environment points AWS clients, children's too, at it."""
    import s3fs

    try:
        with s3_server() as server, pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("tests")
            yield "s3://tests"
    except NoServerError as error:
        pytest.skip(str(error))
