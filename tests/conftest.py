"""What holds for every test, set before anything imports torch."""

import os

# Most tests run several processes on few cores: a thread that waits must not spin away the time of those it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
