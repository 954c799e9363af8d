"""What each role may do in the store, said once; `servers` writes it in the words of SeaweedFS and of AWS.

    robot      writes episodes/<name>/ (lab- and base-: demonstrations/<name>/) and lists it,
               reads run.json, policies, channels
    learner    reads everything, writes all but what robots record and what robots are told to run: whoever takes it
               over can offer policies, and neither release one nor forge an episode
    evaluator  reads everything, writes evaluations/
    release    reads everything, writes channels/
    observer   reads everything

Trust roots lie beside the channels, where robots look for them.
"""

from dataclasses import dataclass

from sop.core import layout

_LEARNERS = (
    layout.RUN,
    *(
        f"{folder}/"
        for folder in (
            layout.DEMONSTRATIONS,
            layout.POLICIES,
            layout.CHECKPOINTS,
            layout.EVALUATIONS,
            layout.INDEX,
            layout.QUARANTINE,
            layout.SCREENED,
            layout.LABELS,
            layout.LEASES,
            "probes",
        )
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """Keys of the run, as prefixes that end in '/' (a folder), are empty (everything) or are one key."""

    read: tuple[str, ...]
    """May be read."""
    listed: tuple[str, ...]
    """May be listed."""
    write: tuple[str, ...]
    """May be created."""
    delete: bool = False
    """Whether what may be written may be deleted, too."""


def grants_of(role: str, name: str) -> Grants:
    """What a member may do in the store.

    Raises:
        ValueError: unknown role.
    """
    everything = ("",)
    if role == "robot":
        folder = layout.DEMONSTRATIONS if layout.before_fleet(name) else layout.EPISODES
        own = f"{folder}/{name}/"
        shared = (f"{layout.POLICIES}/", f"{layout.CHANNELS}/")
        return Grants(read=(layout.RUN, own, *shared), listed=(own, *shared), write=(own,))
    if role == "learner":
        return Grants(read=everything, listed=everything, write=_LEARNERS, delete=True)
    written = {
        "evaluator": (f"{layout.EVALUATIONS}/",),
        "release": (f"{layout.CHANNELS}/",),
        "observer": (),
    }
    if role not in written:
        raise ValueError(f"unknown role {role!r}")
    return Grants(read=everything, listed=everything, write=written[role])
