"""``python -m dattrain`` is the ``dattrain`` command."""

import sys

from dattrain.cli import main

sys.exit(main())
