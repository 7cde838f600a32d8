# The extension module: csrc/module.cpp says what it has; nothing outside this package calls it.
from typing import Any

def __getattr__(name: str) -> Any: ...
