"""`python -m mlops_nb VERB …`: the command line without its installed script."""

import sys

from mlops_nb.interface.cli import main

sys.exit(main())
