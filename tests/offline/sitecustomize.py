"""Refuse every connection but loopback and Unix sockets, in this process and, through PYTHONPATH, in its children."""

import socket
from ipaddress import ip_address

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _check(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return
    try:
        loopback = ip_address(host.split("%")[0]).is_loopback or ip_address(host.split("%")[0]).is_unspecified
    except ValueError:
        loopback = False
    if not loopback:
        raise ConnectionRefusedError(f"the test suite refuses connections that leave this machine, got {host!r}")


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        _check(address[0])
    return _connect(self, address)


def connect_ex(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        _check(address[0])
    return _connect_ex(self, address)


def getaddrinfo(host, *args, **kwargs):
    _check(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
