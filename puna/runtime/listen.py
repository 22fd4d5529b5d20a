"""A TCP port to serve on, had before anything slow begins."""

import socket

from puna.runtime.errors import InputError


def check_port(port: int) -> None:
    """Refuse a number that is no port, with an InputError."""
    if not 0 <= port <= 65535:
        raise InputError(f"port is {port}; a TCP port is between 1 and 65535, or 0 for any free one.")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients that come before the server is ready wait.

    Args:
        host: address to listen on.
        port: 0 takes any that is free.

    Raises:
        InputError: the port is taken, or the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. If another program has the port, perhaps "
            "another Puna, end it, or choose a different port: --set port=0 takes any that is free."
        ) from error


def address_of(listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
