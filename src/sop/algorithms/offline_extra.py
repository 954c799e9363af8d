"""The control arm of SOP's comparison: the operators' time goes into more lab demonstrations, not into corrections."""

from sop.algorithms.bc import BehaviourCloning
from sop.core.experience import Collection


class OfflineExtra(BehaviourCloning):
    """Behaviour cloning while operators keep demonstrating in the lab; the episodes go to the offline buffer."""

    collection = Collection.DEMONSTRATIONS
