"""Which URLs webhooks may go to, and which addresses may be connected to."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_batch_dagster.core.errors import InvalidInput
from vllm_batch_dagster.core.webhook_urls import (
    NO_HOSTS,
    UNACCEPTABLE_URL,
    is_public,
    is_reachable,
    read_allowed_hosts,
    read_webhook_url,
)

PUBLIC = (
    "1.1.1.1",
    "93.184.216.34",
    "2606:4700:4700::1111",
    "2001:4860:4860::8888",
    "::ffff:1.1.1.1",
    "64:ff9b::1.1.1.1",
)
NOT_PUBLIC = (
    # IPv4: unspecified, private, loopback, link-local, CGNAT, documentation, benchmarks, 6to4, multicast, the rest
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "192.88.99.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    # IPv6: unspecified, loopback, link-local, site-local, unique local, multicast, documentation, Teredo, discard
    "::",
    "::1",
    "fe80::1",
    "fec0::1",
    "fc00::1",
    "fd12:3456::1",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "2001:0:4136:e378::1",
    "100::1",
    "3fff::1",
    "5f00::1",
    # IPv4 inside IPv6: mapped, compatible, NAT64 (well-known and local), 6to4
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::1.1.1.1",
    "2002:7f00:1::",
    "2002:101:101::",
)


def refusal_of(url: str, allowed: str = "") -> str:
    with pytest.raises(InvalidInput) as caught:
        read_webhook_url(url, "url", read_allowed_hosts(allowed))
    assert (caught.value.param, caught.value.code) == ("url", UNACCEPTABLE_URL)
    return caught.value.message


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    assert "not on the public internet" in refusal_of(f"https://{host}/hook")


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_the_address_inside(address: object) -> None:
    inside = ip_address(str(address))
    for outside in (f"::ffff:{inside}", f"64:ff9b::{inside}"):
        assert is_public(ip_address(outside)) == is_public(inside)


@given(st.ip_addresses())
def test_nothing_is_public_that_python_calls_private(address: object) -> None:
    found = ip_address(str(address))
    if found.is_private or found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified:
        mapped = getattr(found, "ipv4_mapped", None)
        assert not is_public(found) or (mapped is not None and is_public(mapped))


@pytest.mark.parametrize(
    "host",
    ["2130706433", "0x7f000001", "0x7f.1", "127.1", "0177.0.0.1", "0177.0.0.0x1", "127.0.0.1.", "1.2.3", "256.1.1.1"],
)
def test_an_address_in_another_notation_is_no_host(host: str) -> None:
    """Systems read these as IPv4 addresses."""
    assert "neither a name nor an address" in refusal_of(f"https://{host}/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/hook", "it must begin with https:// (http is for hosts"),
        ("ftp://example.com/", "it must begin with https://"),
        ("example.com/hook", "it must begin with https://"),
        ("", "it must begin with https://"),
        ("https:///hook", "neither a name nor an address"),
        ("https://user:secret@example.com/", "must not carry a user name"),
        ("https://@example.com/", "must not carry a user name"),
        ("https://exa mple.com/", "in ASCII without spaces"),
        ("https://example.com/\r\nx: y", "in ASCII without spaces"),
        ("https://exämple.com/", "in ASCII without spaces"),
        ("https://example.com\\@10.0.0.1/", "in ASCII without spaces"),
        ("https://example.com:99999/", "cannot be read"),
        ("https://example.com:x/", "cannot be read"),
        ("https://example.com:0/", "port 0"),
        ("https://[::1/", "cannot be read"),
        ("https://[fe80::1%25eth0]/", "neither a name nor an address"),
        ("https://a..b/", "neither a name nor an address"),
        (f"https://{'a' * 64}.com/", "neither a name nor an address"),
    ],
)
def test_what_is_refused(url: str, reason: str) -> None:
    assert reason in refusal_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook",
        "https://example.com:8443/hook?token=a%20b&c=d#e",
        "HTTPS://Example.COM",
        "https://xn--bcher-kva.example/",
        "https://under_score.example./",
        "https://1.1.1.1/",
        "https://[2606:4700:4700::1111]:443/",
    ],
)
def test_what_is_taken_as_it_is(url: str) -> None:
    assert read_webhook_url(url, "url") == url


def test_a_url_that_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        read_webhook_url("https://example.com/" + "a" * 500, "metadata.webhook_url")
    assert (caught.value.param, caught.value.code) == ("metadata.webhook_url", "string_above_max_length")


def test_allowed_hosts() -> None:
    allowed = "receiver.internal, 10.0.0.0/8, 127.0.0.1, [::1], fd00::/8"
    hosts = read_allowed_hosts(allowed)
    for url in (
        "http://receiver.internal/",
        "http://RECEIVER.internal.:8000/",
        "http://10.1.2.3/",
        "https://10.1.2.3/",
        "http://127.0.0.1:9000/",
        "http://[::1]/",
        "https://[fd00::5]/",
        "https://[::ffff:10.0.0.1]/",
    ):
        assert read_webhook_url(url, "url", hosts) == url
    for url in ("http://other.internal/", "http://127.0.0.2/", "http://1.1.1.1/", "https://192.168.0.1/"):
        refusal_of(url, allowed)


def test_a_listed_name_may_have_any_address_and_a_listed_network_any_name() -> None:
    hosts = read_allowed_hosts("receiver.internal,10.0.0.0/8")
    assert is_reachable(ip_address("192.168.0.1"), "Receiver.internal", hosts)
    assert is_reachable(ip_address("10.0.0.1"), "example.com", hosts)
    assert is_reachable(ip_address("64:ff9b::a00:1"), "example.com", hosts)
    assert not is_reachable(ip_address("192.168.0.1"), "example.com", hosts)
    assert is_reachable(ip_address("1.1.1.1"), "example.com", NO_HOSTS)


def test_nothing_listed_allows_nothing() -> None:
    assert read_allowed_hosts(" , ") == NO_HOSTS


@pytest.mark.parametrize("text", ["10.0.0.0/99", "http://example.com", "exa mple", "300.1.1.1", "*.internal", "a/b"])
def test_a_setting_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_allowed_hosts(f"ok.internal,{text}")
