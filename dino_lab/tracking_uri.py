"""What `--tracking-uri` may name, and how it is shown; shared by who writes records and who reads them."""

import re
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import unquote, urlsplit

Kind: TypeAlias = Literal["sqlite", "postgresql", "server"]

_KINDS: dict[str, Kind] = {"sqlite": "sqlite", "postgresql": "postgresql", "http": "server", "https": "server"}


def kind_of(uri: str) -> Kind:
    """What the URI names.

    Raises:
        ValueError: none of them, or the database's driver is not installed; says what is allowed.
    """
    scheme, _, _ = urlsplit(uri).scheme.partition("+")
    shown = f"--tracking-uri {without_password(uri, uri)}"
    if scheme not in _KINDS:
        raise ValueError(f"{shown}: must begin with http://, https:// (an MLflow server), postgresql:// or sqlite:///")
    if scheme == "postgresql":
        # Here, since the core alone is installed without it.
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            make_url(uri).get_dialect().import_dbapi()
        except ImportError as error:
            raise ValueError(f"{shown}: {error}; pip install 'psycopg[binary]'") from None
        except ArgumentError as error:
            raise ValueError(f"{shown}: {without_password(str(error), uri)}") from None
    return _KINDS[scheme]


def sqlite_path(uri: str) -> Path:
    """The file of a sqlite URI: sqlite:///in/this/folder, sqlite:////from/the/root."""
    return Path(uri.partition(":///")[2].partition("?")[0])


def without_password(text: str, uri: str) -> str:
    """The text with stars in place of the URI's password, which may stand before the host or among the options."""
    # Up to the last @: a person may have left a / or # in the password as it is, and urlsplit would see none.
    for password in re.findall(r"^[^:]+://[^:/@]*:(.+)@|[?&]password=([^&]*)", uri):
        for written in filter(None, {*password, *map(unquote, password)}):
            text = text.replace(written, "***")
    return text
