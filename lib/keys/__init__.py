"""When two things are the same: values by what they hold, code by what it says and refers to."""

from lib.keys.content import apart, code, content
from lib.keys.source import script
from lib.keys.values import KeysError

__all__ = ["KeysError", "apart", "code", "content", "script"]
