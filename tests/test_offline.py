import socket
import subprocess
import sys

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_connections_that_leave_the_machine_are_refused(address):
    with pytest.raises(ConnectionRefusedError, match="refuses connections that leave this machine"):
        socket.create_connection(address, timeout=1)


def test_child_processes_are_refused_too():
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert "refuses connections that leave this machine" in child.stderr


def test_loopback_is_open():
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname(), timeout=5) as client:
        assert client.getpeername() == server.getsockname()
