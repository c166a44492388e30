"""When two things are the same: values by what they hold, code by what it says and refers to."""

from lib.keys.content import KeysError, apart, code, content
from lib.keys.source import script

__all__ = ["KeysError", "apart", "code", "content", "script"]
