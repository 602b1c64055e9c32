"""The file formats of erasure adapters, see adapter/formats/; `python -m unguide_core.formats` converts them."""

import sys

from .adapter.formats import *  # noqa: F403
from .adapter.formats import __all__ as __all__

if __name__ == "__main__":
    from .adapter.formats.cli import main

    sys.exit(main())
