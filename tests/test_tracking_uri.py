import pytest

from dino_lab.tracking_uri import kind_of, sqlite_path, without_password


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("databricks", "--tracking-uri databricks: must begin with http://, https:// "),
        ("mysql://me:secret@there/db", r"mysql://me:\*\*\*@there/db: must begin with"),
        ("postgresql+asyncpg://me:secret@there/db", r"me:\*\*\*@there/db: No module named 'asyncpg'; pip install"),
        ("postgresql+nothing://me:secret@there/db", r"me:\*\*\*@there/db: Can't load plugin"),
        ("postgresql:there", "Could not parse"),
    ],
)
def test_what_names_no_store_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind_of(uri)


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("http://there:5000", "server"),
        ("https://me:secret@there/mlflow", "server"),
        ("postgresql://me@there/db", "postgresql"),
        ("postgresql+psycopg://me@there/db", "postgresql"),
        ("sqlite:////in/a/folder/mlflow.db", "sqlite"),
    ],
)
def test_a_store_is_known_by_its_uri(uri: str, kind: str) -> None:
    assert kind_of(uri) == kind


def test_the_file_of_a_sqlite_uri() -> None:
    assert str(sqlite_path("sqlite:///here/mlflow.db")) == "here/mlflow.db"
    assert str(sqlite_path("sqlite:////labs/mlflow.db?timeout=9")) == "/labs/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@there/db", "postgresql://me:***@there/db"),
        ("postgresql://me:se/c#r@et@there/db", "postgresql://me:***@there/db"),
        ("postgresql://there/db?user=me&password=secret&x=1", "postgresql://there/db?user=me&password=***&x=1"),
        ("https://there:5000/mlflow", "https://there:5000/mlflow"),
        ("postgresql://me@there/db", "postgresql://me@there/db"),
    ],
)
def test_a_password_is_never_shown(uri: str, shown: str) -> None:
    assert without_password(uri, uri) == shown


def test_a_password_is_not_shown_in_other_words_either() -> None:
    uri = "postgresql://me:se%20cret@there"
    assert without_password(f"no se cret of {uri}", uri) == "no *** of postgresql://me:***@there"
