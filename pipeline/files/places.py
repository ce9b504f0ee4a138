"""What a path or URI names: a place on a disk, or a filesystem of fsspec's and a path inside it.

A local path, s3://, gs://, hf://, or package://x, which is pipeline/assets/x. Endpoints and credentials come from the
environment as each backend reads it (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN,
...), never from a URI.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.files import local
from pipeline.host.errors import Refused

ASSETS = Path(__file__).parents[1] / "assets"
EXTRAS = {"gs": "gcs", "gcs": "gcs", "hf": "hf"}  # protocol -> the extra of this package that brings it
JOB_FOLDER = "runtime_resources/working_dir_files"  # where `ray job submit --working-dir` unpacks the code
# The part before the first slash has a colon that begins no port, and an @ follows; a secret may hold slashes, too.
USER_INFO = re.compile(r"://(?!arn:)[^/@:]+:(?!\d+/).*@")


def resolve(uri: str) -> str:
    """A URI that no longer depends on the current folder: a local path made absolute, a remote one as it is."""
    if uri.startswith("package://"):
        return str(ASSETS / uri.removeprefix("package://"))
    if "://" in uri and not uri.startswith("file://"):
        return uri.rstrip("/")
    path = _path(uri)
    return str(path if path.is_absolute() else base() / path)


def is_relative(uri: str) -> bool:
    """Whether a URI means another place in another folder."""
    return ("://" not in uri or uri.startswith("file://")) and not _path(uri).is_absolute()


def base() -> Path:
    """What relative paths start from: the current folder, unless it is one that Ray deletes after the job."""
    folder = os.getcwd()
    return home() if JOB_FOLDER in folder else Path(folder)


def _path(uri: str) -> Path:
    path = Path(uri.removeprefix("file://"))
    return local.user().joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path


def home() -> Path:
    """Where files go that need a local folder and were given none that lasts."""
    return local.user() / "distilled-decoding"


def check_no_credentials(uri: str, name: str) -> None:
    """ValueError, which does not repeat them, if a URI carries user and password; ``name`` says whose URI it is."""
    if USER_INFO.search(uri):
        raise Refused(
            f"{name} carries a user and a password; take them out of the URI and set them in the environment (for S3:"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )


def is_remote(uri: str) -> bool:
    return "://" in resolve(uri)


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the fsspec filesystem, the path inside it) of a URI; it knows nothing from before, because others write too."""
    check_no_credentials(uri, f"the URI ...@{uri.rpartition('@')[2]}")
    if not is_remote(uri):  # as it is: fsspec would take "::" and a leading "local:" for its own signs
        return LocalFileSystem(), resolve(uri)
    protocol = resolve(uri).partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(resolve(uri))
    except ImportError as error:
        extra = f"[{EXTRAS[protocol]}]" if protocol in EXTRAS else ""
        raise Refused(
            f"{uri} needs a package that is not installed ({error}); pip install 'distilled-decoding{extra}'."
        ) from None
    except ValueError as error:
        raise Refused(f"{uri} cannot be opened ({error}); use a path, s3://, gs://, hf:// or package://.") from None
    fs.invalidate_cache()
    return fs, path
