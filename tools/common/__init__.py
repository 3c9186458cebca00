"""Code that several tools share.

Tools import this package before torch: OpenMP reads how its threads wait when it is loaded. Threads
that spin slow a busy machine down, and cost nothing less on an idle one.
"""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
