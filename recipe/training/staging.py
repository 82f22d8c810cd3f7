"""Folders that are complete or not there: written under another name, and renamed when all of it is on the disk.

    output/.saving/unfinished/NAME    is being written, and of no use if the run ends now
    output/.saving/NAME               is complete, and about to take its place
    output/NAME                       is complete

A kill at any moment, of the machine as well, loses at most what was being written.
"""

import os
import shutil
import tempfile

SAVING = ".saving"
UNFINISHED = "unfinished"
OLD = "old "  # begins the names of what is being deleted


def unfinished(output_dir: str) -> str:
    """Return the folder into which to write folders that are to be published. They may lie there from earlier."""
    return os.path.join(output_dir, SAVING, UNFINISHED)


def place_of(folder: str) -> str:
    """Return the place that a folder takes when it is published; other folders stay where they are."""
    return folder.replace(os.path.join(SAVING, UNFINISHED) + os.sep, "")


def publish(output_dir: str, name: str) -> None:
    """Let the folder `name` take its place in the output folder, also that of an older one.

    Raises:
        OSError: The disk is full, or broken.
    """
    written, ready = os.path.join(unfinished(output_dir), name), os.path.join(output_dir, SAVING, name)
    for folder, _, files in os.walk(written):
        for path in [os.path.join(folder, file) for file in files] + [folder]:
            _flush(path)
    os.rename(written, ready)
    _flush(os.path.dirname(ready))
    _take_place(output_dir, name)
    _delete(os.path.join(output_dir, SAVING))


def discard(output_dir: str, name: str) -> None:
    """Delete a folder; at no moment is a part of it found under its name."""
    os.makedirs(unfinished(output_dir), exist_ok=True)
    trash = tempfile.mkdtemp(prefix=OLD, dir=unfinished(output_dir))
    os.rename(os.path.join(output_dir, name), os.path.join(trash, name))
    _delete(trash)


def _delete(folder: str) -> None:
    """Delete a folder as far as possible; on NFS a file that somebody reads stays until it is closed."""
    shutil.rmtree(folder, ignore_errors=True)


def recover(output_dir: str) -> list[str]:
    """Clear up after a run that was killed while it wrote: complete folders take their place, others are deleted.

    Returns:
        Names of the folders that were not complete.
    """
    saving = os.path.join(output_dir, SAVING)
    if not os.path.isdir(saving):
        return []
    for name in set(os.listdir(saving)) - {UNFINISHED}:
        _take_place(output_dir, name)
    lost = os.listdir(unfinished(output_dir)) if os.path.isdir(unfinished(output_dir)) else []
    _delete(saving)
    return sorted(name for name in lost if not name.startswith(OLD))


def _take_place(output_dir: str, name: str) -> None:
    if os.path.exists(os.path.join(output_dir, name)):
        discard(output_dir, name)
    os.rename(os.path.join(output_dir, SAVING, name), os.path.join(output_dir, name))
    _flush(output_dir)


def _flush(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
