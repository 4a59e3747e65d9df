"""A real S3-compatible server for the handlers that write objects: SeaweedFS from PyPI, which checks signatures and
knows conditional puts. Started once, on free ports of loopback, with a user who may do everything."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import hold_ports

START_SECONDS = 120
ACCESS_KEY, SECRET_KEY = "testkey", "a-secret-that-nobody-may-see"
BUCKET = "results"
GRPC_OFFSET = 10_000  # each part also listens that much higher

_prefixes = itertools.count(1)


class ObjectServer:
    """A running server with one bucket."""

    def __init__(self, port: int) -> None:
        self.endpoint_url = f"http://127.0.0.1:{port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to reach it. Nothing of the machine's own configuration is read."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def new_prefix(self) -> str:
        """Return the URL of a prefix that no other test has."""
        return f"s3://{BUCKET}/test-{next(_prefixes)}"


@contextlib.contextmanager
def run_objects(folder: Path) -> Iterator[ObjectServer]:
    names = ("s3", "master", "volume", "filer", "admin")
    with hold_ports(len(names), GRPC_OFFSET) as ports, _serve(folder, dict(zip(names, ports, strict=True))) as objects:
        yield objects


@contextlib.contextmanager
def _serve(folder: Path, ports: dict[str, int]) -> Iterator[ObjectServer]:
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            _command(folder, ports), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        objects = ObjectServer(ports["s3"])
        _wait_until_ready(objects, ports["s3"], server, log)
        yield objects
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)


def _command(folder: Path, ports: dict[str, int]) -> list[str]:
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        pytest.fail("no SeaweedFS in this environment: install requirements/dev.txt")
    user = {
        "name": "tester",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    (folder / "data").mkdir()
    quiet = ("-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0")
    return [
        *(str(program), "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *quiet),
        *(f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]


def _wait_until_ready(objects: ObjectServer, port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the bucket can be made: the port opens before the server can store anything."""
    from botocore.exceptions import BotoCoreError, ClientError

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            make_client(objects).create_bucket(Bucket=BUCKET)
            return
        except (OSError, BotoCoreError, ClientError) as error:
            if _is_made(error):
                return
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"SeaweedFS did not start: {error}\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)


def _is_made(error: Exception) -> bool:
    """The answer of an earlier try was lost: the client sends a call again whose answer takes too long."""
    answer = getattr(error, "response", {})
    return answer.get("Error", {}).get("Code") in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make_client(objects: ObjectServer) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    return Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1").client(
        "s3", endpoint_url=objects.endpoint_url, config=Config(s3={"addressing_style": "path"})
    )


def list_keys(objects: ObjectServer, url: str) -> list[str]:
    """Return the keys of all objects under `url`, relative to it."""
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = make_client(objects).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return sorted(found["Key"].removeprefix(prefix) for page in pages for found in page.get("Contents", ()))


def list_unfinished(objects: ObjectServer, url: str) -> list[str]:
    """Return the keys of the multipart uploads under `url` that were neither completed nor aborted."""
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    found = make_client(objects).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return [each["Key"].removeprefix(prefix) for each in found.get("Uploads", ())]


def read_object(objects: ObjectServer, url: str, key: str) -> bytes:
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    content: bytes = make_client(objects).get_object(Bucket=BUCKET, Key=prefix + key)["Body"].read()
    return content
