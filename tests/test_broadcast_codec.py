"""The codec without its extra: a sentence, not a traceback from deep inside."""

import subprocess
import sys

from sop.broadcast.codec import load_codec

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from sop.broadcast import PolicyReader
from sop.core.errors import RunError
from sop.testing.link import LinkStore
from sop.testing.memory import MemoryStore
PolicyReader(MemoryStore())  # maps its objects: needs no codec
try:
    PolicyReader(LinkStore(MemoryStore()))
except RunError as error:
    print(error)
"""


def test_a_robot_behind_a_link_says_what_to_install_and_one_that_maps_needs_nothing() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("policies that are packed for a link need numba: pip install -e '.[link]'")


def test_the_codec_is_one_module() -> None:
    assert load_codec() is load_codec()
