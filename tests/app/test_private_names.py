"""The private names of other libraries that this one relies on, and the versions that have them.

Each is used in one module. A new version of a library may rename any of them: raise its upper
bound in setup.cfg only after these tests have passed with it.
"""

from __future__ import annotations

from pathlib import Path

import celery_eda

PACKAGE = Path(celery_eda.__file__).parent
