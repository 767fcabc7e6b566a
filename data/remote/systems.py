"""File systems of fsspec (s3, gs, ...), and what their errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stoker.data.remote.retries import Patience, Refused, Transient


def open_system(name: str, patience: Patience) -> Any:
    """The fsspec file system of a URL scheme. Raises ValueError when a package that it needs is not installed."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True}
    if name == "s3":
        stall = patience.stall_seconds
        options["config_kwargs"] = {"read_timeout": stall, "connect_timeout": stall, "retries": {"max_attempts": 1}}
    try:
        return fsspec.filesystem(name, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot read {name}:// addresses: {error}") from error


@contextmanager
def told() -> Iterator[None]:
    """Turns errors of a file system into Refused where they are permanent and Transient where they may pass."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused("it does not exist") from error
    except PermissionError as error:
        raise Refused(f"it may not be read: {error}") from error
    except Exception as error:  # file systems raise different errors
        raise Transient(f"{type(error).__name__}: {error}") from error
