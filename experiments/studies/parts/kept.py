"""Results of finished runs as JSON files, which a study that is started again only reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def kept(path: Path, settings: Mapping[str, Any], name: str) -> Any | None:
    """The value called `name` of a file that a study has written; None if there is no file.

    Args:
      path: path of the file.
      settings: the values that the file must have besides, by name.
      name: name of the result.

    Raises:
      ValueError: if the file is none of the study, or of other settings: it is not replaced.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        expected = json.loads(json.dumps(dict(settings)))  # tuples are lists in a file
        unlike = [key for key, value in expected.items() if document[key] != value]
        result = document[name]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"workdir: expected {path} to be a file of this command, could not read it: {error}") from None
    if unlike:
        raise ValueError(
            f"workdir: expected {path} to be of the same settings, got another {unlike[0]}; name another one"
        )
    return result
