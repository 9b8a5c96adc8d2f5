"""``python -m fused_resnet`` is the command ``fused-resnet``."""

import sys

from .cli import main

sys.exit(main())
