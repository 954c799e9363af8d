"""The fifty faults, in order: what is required of the system and the tests that execute it."""

from sop.chaos.fault import Fault
from sop.chaos.faults_of_data import FAULTS_OF_DATA
from sop.chaos.faults_of_policies import FAULTS_OF_POLICIES

FAULTS: tuple[Fault, ...] = FAULTS_OF_DATA + FAULTS_OF_POLICIES
"""Numbers 1 to 50."""
