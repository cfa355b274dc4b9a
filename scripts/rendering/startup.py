# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""A command's own process imports torch and transformers sooner; for `if __name__ == "__main__"` only."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports these where it finds them, for losses and devices that rendering never uses: 0.4 s of one core
UNUSED = ("accelerate", "scipy")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports inside run without garbage collection, and find none of the `UNUSED` packages.

    A None in `sys.modules` is how Python is told that a module cannot be imported. Afterwards they can be again; what
    was imported meanwhile goes on without them, and none of it is searched for garbage any more.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name in hidden:
            sys.modules.pop(name, None)
