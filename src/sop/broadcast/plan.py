"""Which forms to fetch: the cheapest way from what a robot holds to a version.

nothing --keyframe 4--> 4 --delta--> 5 --delta--> 6 --delta--> 7
                                     ^
a robot that holds 5 -----------------
"""

from collections.abc import Callable, Collection

from sop.broadcast.manifest import ENCODINGS, FileEntry, PolicyManifest


def cheapest_way(
    manifest: PolicyManifest,
    held: int | None,
    cost: Callable[[FileEntry], int],
    without: Collection[str] = (),
) -> tuple[FileEntry, ...] | None:
    """The forms to decode one after the other, at least one; None when no way leads to the version.

    The first stands alone or builds on `held`, each further one builds on the one before. A form builds on an
    older version only, so one pass in the order of versions finds the cheapest way: there are no cycles.

    Args:
        manifest: of the version to reach; its files and its history are the roads.
        held: version whose tensors are at hand, None for nothing. At hand is free.
        cost: of one form, 0 or more; equal costs are decided by fewer forms.
        without: keys of forms that turned out to be missing or broken.
    """
    ways: dict[int, tuple[int, tuple[FileEntry, ...]]] = {}
    if held is not None and held < manifest.version:
        ways[held] = (0, ())
    for file in sorted((*manifest.history, *manifest.files), key=lambda file: file.version):
        if file.key in without or file.encoding not in ENCODINGS:
            continue
        before = (0, ()) if file.base is None else ways.get(file.base)
        if before is None:
            continue
        total, files = before[0] + cost(file), (*before[1], file)
        known = ways.get(file.version)
        if known is None or (total, len(files)) < (known[0], len(known[1])):
            ways[file.version] = (total, files)
    found = ways.get(manifest.version)
    return None if found is None else found[1]
