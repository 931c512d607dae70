"""``python -m dattrain`` is the ``dattrain`` command."""

import sys

from dattrain.cli.main import main

sys.exit(main())
