"""http(s): range requests that can be resumed at any byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from stoker.conf.secrets import conceal, reveal
from stoker.data.remote.retries import Patience, Refused, Transient

_PIECE = 256 << 10  # bytes taken from a connection at once
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # status codes of temporary failures


class Web:
    """A pool of connections. Made on first use in each process, because connections cannot be shared over a fork."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._session: Any = None
        self._pid = 0

    def head(self, url: str) -> tuple[int, str]:
        """Size in bytes and version of the file at `url`. Raises Transient or Refused."""
        response = self._ask(url, {"Range": "bytes=0-0", "Accept-Encoding": "identity"})
        with response:
            span = response.headers.get("Content-Range", "")
            size = span.rpartition("/")[2]
            if response.status_code != 206 or not size.isdigit():
                if response.status_code == 416 and size == "0":
                    return 0, _version(response)
                raise Refused(f"the server answers {response.status_code} to a range request: it must support ranges")
            return int(size), _version(response)

    def read(self, url: str, begin: int, end: int, size: int, version: str) -> Iterator[bytes]:
        """Bytes `begin` to `end`, in pieces. Raises Transient, also for a body cut short, or Refused."""
        import urllib3

        response = self._ask(url, {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"})
        with response:
            if response.status_code != 206:
                raise Refused(f"the server answers {response.status_code} to a range request")
            span = response.headers.get("Content-Range", "")
            wanted = f"bytes {begin}-{end - 1}/{size}"
            if span != wanted:
                raise Refused(f"requested {wanted}, the server returns {span or 'no range'}: it changed")
            if _version(response) != version:
                raise Refused(f"its ETag is {_version(response) or 'gone'} and was {version}: it changed")
            left = end - begin
            try:
                while piece := response.raw.read1(_PIECE):  # what has arrived: a broken connection loses none of it
                    if len(piece) > left:
                        raise Refused(f"the server sends more than the {end - begin} bytes asked for")
                    left -= len(piece)
                    yield piece
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise Transient(f"the connection broke: {_short(error)}") from error
            if left:
                raise Transient(f"the body is {left} bytes short")

    def _ask(self, url: str, headers: dict[str, str]) -> Any:
        import requests

        if self._pid != os.getpid():
            self._session, self._pid = requests.Session(), os.getpid()
        try:
            stall = self._patience.stall_seconds
            response = self._session.get(reveal(url), headers=headers, stream=True, timeout=(stall, stall))
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            raise Refused(conceal(str(error), url)) from None  # its cause would show what is concealed
        except requests.RequestException as error:
            raise Transient(f"no answer: {conceal(_short(error), url)}") from None
        except ValueError as error:
            raise Refused(str(error)) from error
        if response.status_code in _PASSING:
            response.close()
            raise Transient(f"the server answers {response.status_code} {response.reason}")
        if response.status_code >= 400 and response.status_code != 416:
            response.close()
            raise Refused(f"the server answers {response.status_code} {response.reason}")
        return response


def _version(response: Any) -> str:
    return response.headers.get("ETag", "") or response.headers.get("Last-Modified", "")


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
